"""What a request has to keep (a form, calls of tools) → the grammar of its whole output, checked. None where all is free.

A model that thinks does so first, outside of what is asked of its answer. Knows markers and rules; no bodies, no HTTP.
"""

from .backend import Serving
from .call_rules import CallRules, marked
from .errors import Invalid
from .forms import Form
from .front import Front
from .grammar import Grammar, Part, part_of
from .reasoning import Markers
from .text import TextTokenizer
from .tools import ToolUse


async def grammar_of(
    front: Front, serving: Serving, form: Form | None, tools: ToolUse | None = None, *, opened: bool = False
) -> str | None:
    """The grammar of a sequence's output, as the engine takes it. Raises Invalid.

    Args:
        front: what the routes share.
        serving: what answers.
        form: what the answer has to match, if it is to match anything.
        tools: what may be called, or has to be.
        opened: whether the prompt ends where the model's thinking has begun.
    """
    if form is None and (tools is None or not tools.guided):
        return None
    param = form.param if form is not None else "functions" if tools is not None and tools.legacy else "tools"
    if front.config.disable_grammar_support:
        raise Invalid("grammar is not supported", param=param)
    markers = front.markers(serving)

    def make() -> str:
        return _grammar(serving, form, tools, markers, opened=opened).text()

    return await front.grammars.check(make, param)


def _grammar(
    serving: Serving, form: Form | None, tools: ToolUse | None, markers: Markers | None, *, opened: bool
) -> Grammar:
    parts: dict[str, Part] = {} if form is None else {"form": part_of(form)}
    if tools is None:
        rules = "answer: @form"
    else:
        calls = CallRules(serving.tool_format, tools, serving.tokenizer)
        parts |= calls.parts
        # Who has to call a tool is not asked for a text as well.
        if tools.choice == "required":
            rules, parts = calls.required(), calls.parts
        else:
            rules = calls.chosen("@form" if form is not None else "")
    return Grammar("\n".join([*_thinking(markers, serving.tokenizer, opened=opened), rules, ""]), parts)


def _thinking(markers: Markers | None, tokenizer: TextTokenizer, *, opened: bool) -> list[str]:
    if markers is None:
        return ["start: answer"]
    opening, closing = (marked(tokenizer, mark) for mark in (markers.open, markers.close))
    # A text ends where the mark does, which a lazy rule sees to; a control token is no text, and ends it anyway.
    lazy = "" if closing.startswith("<[") else "[lazy]"
    return [
        "start: thought GAP? answer" if opened else f"start: ({opening} thought GAP?)? answer",
        f"thought{lazy}: THOUGHT {closing}",
        r"THOUGHT: /(.|\n)*/",
        r"GAP: /[ \n]{1,4}/",
    ]
