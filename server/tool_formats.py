"""How models write that they call a tool: a table, and which entry a model's own chat template speaks of.

Formats that no entry describes, and models whose template knows no tools, get `PLAIN`: the tools are told in the system prompt
(`tool_prompt.py`) and calls are written as most models have seen them. Parsing is `tool_parser.py`, the grammar `call_rules.py`.
"""

from dataclasses import dataclass
from typing import Literal

from .text import TextTokenizer, special_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """What stands around the parts of a call that is written in tags."""

    name_close: str = ""
    """Behind the name; if empty, any space or the next tag."""
    key_open: str
    key_close: str
    value_open: str = ""
    value_close: str
    lines: bool = False
    """Whether a value has lines of its own."""
    end: str
    own_end: bool = True
    """Whether the end is not the closing mark of all calls at once."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them."""
        return (self.key_open, self.key_close, self.value_open, self.value_close, self.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How one family of models writes calls: `opening call (between call)* closing`."""

    syntax: Literal["json", "named", "python", "tags", "other"]
    """`{"name": "f", "arguments": {…}}`, `f[ARGS]{…}`, `f(a=1)`, as `tags` say, or in a way that nobody here can write."""
    tags: Tags | None = None
    marks: tuple[str, ...] = ()
    """Texts that begin calls wherever they stand in an answer; the first is the one to write."""
    close: str = ""
    """What comes after calls."""
    bare: str = ""
    """The character that begins calls without a mark, at the start of an answer only."""
    name: str = "name"
    """The key of the name."""
    arguments: str = "arguments"
    """The key of the arguments."""
    name_close: str = ""
    """Of `named`: what stands between the name and the arguments."""
    opening: tuple[str, ...]
    between: tuple[str, ...]
    closing: tuple[str, ...] = ()
    """What to write around calls, in pieces: a mark is one by itself."""
    told: bool = True
    """Whether the chat template tells of tools, calls and results."""
    short_ids: bool = False
    """Whether the chat template takes ids of nine letters and digits only."""


HERMES = ToolFormat(
    syntax="json", marks=("<tool_call>",), close="</tool_call>",
    opening=("<tool_call>", "\n"), between=("\n", "</tool_call>", "\n", "<tool_call>", "\n"),
    closing=("\n", "</tool_call>"),
)  # fmt: skip
"""Hermes, Qwen, SmolLM3 and most others."""
PLAIN = ToolFormat(
    syntax=HERMES.syntax, marks=HERMES.marks, close=HERMES.close, opening=HERMES.opening, between=HERMES.between,
    closing=HERMES.closing, told=False,
)  # fmt: skip
LLAMA = ToolFormat(
    syntax="json", marks=("<|python_tag|>",), bare="{", arguments="parameters", opening=(), between=("; ",)
)
"""Llama 3."""
MISTRAL = ToolFormat(
    syntax="json",
    marks=("[TOOL_CALLS]",),
    opening=("[TOOL_CALLS]", "["),
    between=(", ",),
    closing=("]",),
    short_ids=True,
)
ARGUMENTS_MARK, ID_MARK = "[ARGS]", "[CALL_ID]"
"""Of Mistral: before the arguments, and before an id that some models write as well."""
MISTRAL_NAMED = ToolFormat(
    syntax="named",
    name_close=ARGUMENTS_MARK,
    marks=("[TOOL_CALLS]",),
    opening=("[TOOL_CALLS]",),
    between=("[TOOL_CALLS]",),
    short_ids=True,
)
"""Mistral since its tokenizer's version 11."""
PYTHON = ToolFormat(syntax="python", bare="[", opening=("[",), between=(", ",), closing=("]",))
"""Llama 4, ToolACE."""
LFM = ToolFormat(
    syntax="python", marks=("<|tool_call_start|>",), close="<|tool_call_end|>", opening=("<|tool_call_start|>", "["),
    between=(", ",), closing=("]", "<|tool_call_end|>"),
)  # fmt: skip
"""LFM2."""
_FUNCTION_TAGS = Tags(
    name_close=">",
    key_open="<parameter=",
    key_close=">",
    value_close="</parameter>",
    lines=True,
    end="</function>",
)
QWEN_CODER = ToolFormat(
    syntax="tags", tags=_FUNCTION_TAGS, marks=("<tool_call>", "<function="), close="</tool_call>",
    opening=("<tool_call>", "\n", "<function="),
    between=("\n", "</tool_call>", "\n", "<tool_call>", "\n", "<function="), closing=("\n", "</tool_call>"),
)  # fmt: skip
"""Qwen3-Coder and those after it; a model that forgets the outer mark is understood as well."""
SEED = ToolFormat(
    syntax="tags", tags=_FUNCTION_TAGS, marks=("<seed:tool_call>", "<function="), close="</seed:tool_call>",
    opening=("<seed:tool_call>", "\n", "<function="), between=("\n", "<function="), closing=("\n", "</seed:tool_call>"),
)  # fmt: skip
"""Seed-OSS."""
GLM = ToolFormat(
    syntax="tags", marks=("<tool_call>",), close="</tool_call>",
    tags=Tags(key_open="<arg_key>", key_close="</arg_key>", value_open="<arg_value>", value_close="</arg_value>",
              end="</tool_call>", own_end=False),
    opening=("<tool_call>",), between=("</tool_call>", "\n", "<tool_call>"), closing=("</tool_call>",),
)  # fmt: skip
"""GLM 4.5 and those after it."""


def find_format(tokenizer: TextTokenizer) -> ToolFormat:
    """The format of a model, from the words of the template that it would be told of tools with."""
    template = tokenizer.tool_template or ""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if ARGUMENTS_MARK in template else MISTRAL
    # These put tags of their own into the marks of others.
    if "<function=" in template:
        return SEED if "seed:tool_call" in template else QWEN_CODER
    if "<arg_key>" in template:
        return GLM
    if "<tool_call>" in template:
        return HERMES
    if "<|tool_call_start|>" in template or "<|tool_list_start|>" in template:
        return LFM
    if '"parameters": dictionary' in template or "<|python_tag|>" in template:
        return LLAMA
    return PYTHON if "func_name1(" in template else PLAIN


def kept_ids(form: ToolFormat, tokenizer: TextTokenizer) -> frozenset[int]:
    """Control tokens of a format, whose text is needed to find calls."""
    inner = form.tags.texts if form.tags is not None else (ARGUMENTS_MARK, ID_MARK)
    marks = (*form.marks, form.close, *inner)
    return frozenset(i for mark in marks if mark and (i := special_id(tokenizer, mark)) is not None)
