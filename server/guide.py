"""What a request has to keep (a form, calls of tools) → the grammar of its whole output, checked. None where all is free.

A model that thinks does so first, outside of what is asked of its answer. Knows markers and rules; no bodies, no HTTP.
"""

from .backend import Serving
from .call_rules import CallRules, marked
from .declared import Declared
from .errors import Invalid, Unsupported
from .forms import Form
from .front import Front
from .grammar import Grammar, Part, part_of
from .reasoning import Markers
from .text import TextTokenizer
from .tool_formats import PLAIN
from .tools import ToolUse


async def grammar_of(
    front: Front,
    serving: Serving,
    form: Form | None,
    tools: ToolUse | None = None,
    *,
    chat: bool = False,
    opened: bool = False,
) -> str | None:
    """The grammar of a sequence's output, as the engine takes it. Raises Invalid.

    Args:
        front: what the routes share.
        serving: what answers.
        form: what the answer has to match, if it is to match anything.
        tools: what may be called, or has to be.
        chat: whether the output is a message, as the model's template frames it.
        opened: whether the prompt ends where the model's thinking has begun.
    """
    if form is None and (tools is None or not tools.guided):
        return None
    param = form.param if form is not None else "functions" if tools is not None and tools.legacy else "tools"
    if front.config.disable_grammar_support:
        raise Invalid("grammar is not supported", param=param)
    markers = front.markers(serving)

    def make() -> str:
        declared = serving.declared if chat else None
        return _grammar(serving, declared, form, tools, markers, opened=opened).text()

    return await front.grammars.check(make, param)


def _grammar(
    serving: Serving,
    declared: Declared | None,
    form: Form | None,
    tools: ToolUse | None,
    markers: Markers | None,
    *,
    opened: bool,
) -> Grammar:
    parts: dict[str, Part] = {} if form is None else {"form": part_of(form)}
    if declared is not None and declared.thinks and declared.markers is None:
        raise Unsupported(
            "this model's response template does not tell how thinking is written, so nothing can be asked of its answers' form",
            param=form.param if form is not None else "tools",
        )
    text_open = "" if declared is None else declared.text_open
    if tools is None:
        rules = "answer: @form"
    else:
        calls = CallRules(serving.tool_format, tools, serving.tokenizer)
        parts |= calls.parts
        own = serving.tool_format is not PLAIN
        # Who has to call a tool is not asked for a text as well.
        if tools.choice == "required":
            rules, parts = calls.required(), calls.parts
        else:
            rules = calls.chosen("@form" if form is not None else "", text_open if own else "")
        text_open = "" if own else text_open
    start = _start(
        serving.tokenizer, markers, "" if declared is None else declared.lead, text_open, opened=opened
    )
    return Grammar("\n".join([*start, rules, ""]), parts)


def _start(
    tokenizer: TextTokenizer, markers: Markers | None, lead: str, text_open: str, *, opened: bool
) -> list[str]:
    """Rules of `start`: thinking if the model thinks, then `answer`.

    Args:
        tokenizer: the model's.
        markers: what stands round its thinking.
        lead: what it may write between thinking and answer.
        text_open: what its answer begins with.
        opened: whether the prompt ends where thinking has begun.
    """
    answer = f"{marked(tokenizer, text_open)} answer" if text_open else "answer"
    if markers is None:
        return [f"start: {answer}"]
    opening, closing = (marked(tokenizer, mark) for mark in (markers.open, markers.close))
    # A text ends where the mark does, which a lazy rule sees to; a control token is no text, and ends it anyway.
    lazy = "" if closing.startswith("<[") else "[lazy]"
    gap = f"GAP? ({marked(tokenizer, lead)})?" if lead else "GAP?"
    return [
        f"start: thought {gap} {answer}" if opened else f"start: ({opening} thought {gap})? {answer}",
        f"thought{lazy}: THOUGHT {closing}",
        r"THOUGHT: /(.|\n)*/",
        r"GAP: /[ \n]{1,4}/",
    ]
