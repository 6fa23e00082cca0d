"""How models write that they call a tool: a table, which entry a model's own chat template speaks of, and its grammar.

Formats that no entry describes, and models whose template knows no tools, get `PLAIN`: the tools are told in the system prompt
(`tool_prompt.py`) and calls are written as most models have seen them. Knows texts and grammars; parsing is `tool_parser.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .grammar import Part, literal, one_of, schema_part
from .text import TextTokenizer, special_id
from .tools import Tool, ToolUse

MAX_CALLS = 8
"""Most calls of one answer that a grammar has to hold; a small model would not end by itself."""
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How one family of models writes calls: `opening call (between call)* closing`."""

    syntax: Literal["json", "named", "python"]
    """`{"name": "f", "arguments": {…}}`, `f[ARGS]{…}`, or `f(a=1)`."""
    marks: tuple[str, ...] = ()
    """Texts that begin calls wherever they stand in an answer; the first is the one to write."""
    close: str = ""
    """What comes after calls."""
    bare: str = ""
    """The character that begins calls without a mark, at the start of an answer only."""
    arguments: str = "arguments"
    """The key of the arguments."""
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
MISTRAL_NAMED = ToolFormat(
    syntax="named",
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
ARGUMENTS_MARK, ID_MARK = "[ARGS]", "[CALL_ID]"
"""Of `named`: before the arguments, and before an id that some models write as well."""


def find_format(tokenizer: TextTokenizer) -> ToolFormat:
    """The format of a model, from the words of the template that it would be told of tools with."""
    template = tokenizer.tool_template or ""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if ARGUMENTS_MARK in template else MISTRAL
    # Qwen3-Coder and GLM put XML into the same marks.
    if "<tool_call>" in template and not any(word in template for word in ("<function=", "<arg_key>")):
        return HERMES
    if "<|tool_call_start|>" in template or "<|tool_list_start|>" in template:
        return LFM
    if '"parameters": dictionary' in template or "<|python_tag|>" in template:
        return LLAMA
    return PYTHON if "func_name1(" in template else PLAIN


def kept_ids(form: ToolFormat, tokenizer: TextTokenizer) -> frozenset[int]:
    """Control tokens of a format, whose text is needed to find calls."""
    marks = (*form.marks, form.close, ARGUMENTS_MARK, ID_MARK)
    return frozenset(i for mark in marks if mark and (i := special_id(tokenizer, mark)) is not None)


class CallRules:
    """The rules of calls in one format, as lines of Lark, and the grammars of their arguments."""

    def __init__(self, form: ToolFormat, use: ToolUse, tokenizer: TextTokenizer) -> None:
        """Raises Invalid for a schema that cannot be used."""
        self._form = form
        self._tokenizer = tokenizer
        self._lines: list[str] = []
        self.parts: dict[str, Part] = {}
        names = [self._call(i, tool) for i, tool in enumerate(use.allowed)]
        self._lines.append(f"call: {one_of(names)}")
        more = self._more(MAX_CALLS - 1) if use.parallel else ""
        self._lines.append(f"calls: {self._pieces(form.opening)} call{more} {self._pieces(form.closing)}")
        # The same behind a mark that has been written already.
        self._lines.append(f"rest: {self._pieces(form.opening[1:])} call{more} {self._pieces(form.closing)}")

    def required(self) -> str:
        """Rules of `answer`: calls and nothing else."""
        return self._rules("answer: calls")

    def chosen(self, otherwise: str = "") -> str:
        """Rules of `answer`: calls behind a free text, or that text alone, or calls or what `otherwise` names."""
        if otherwise:
            return self._rules(f"answer: calls | {otherwise}")
        if self._form.bare:
            first = rf"[^\s\{self._form.bare}]"
            return self._rules("answer: calls | SAID?", rf"SAID: /{first}(.|\n)*/")
        mark = self._piece(self._form.marks[0])
        # A text ends where the mark does, which a lazy rule sees to; a control token is no text, and ends it anyway.
        head = f"head: SAID {mark}" if mark.startswith("<[") else f"head[lazy]: SAID {mark}"
        return self._rules("answer: head rest | said", "said: SAID", head, r"SAID: /(.|\n)*/")

    def _rules(self, *lines: str) -> str:
        return "\n".join([*lines, *self._lines])

    def _more(self, most: int) -> str:
        return f" ({self._pieces(self._form.between)} call){{0,{most}}}"

    def _call(self, i: int, tool: Tool) -> str:
        name, key = f"call_{i}", self._form.arguments
        if self._form.syntax == "python":
            self._lines += self._python(name, i, tool)
            return name
        self.parts[f"args_{i}"] = schema_part(tool.parameters, tool.param)
        if self._form.syntax == "named":
            self._lines.append(f"{name}: {literal(tool.name)} {self._piece(ARGUMENTS_MARK)} @args_{i}")
        else:
            opening = f'{{"name": {literal(tool.name)}, "{key}": '
            self._lines.append(f"{name}: {literal(opening)} @args_{i} {literal('}')}")
        return name

    def _python(self, name: str, i: int, tool: Tool) -> list[str]:
        """`f(a=1, b="c")`, the arguments in the order of the schema; what Python cannot name goes through `**`."""
        schema = tool.parameters
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not all(_IDENTIFIER.fullmatch(key) for key in properties):
            self.parts[f"args_{i}"] = schema_part(schema, tool.param)
            return [f"{name}: {literal(f'{tool.name}(**')} @args_{i} {literal(')')}"]
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required: Sequence[Any] = schema.get("required") or ()
        lines = [f"{name}: {literal(tool.name + '(')} {name}_first_0 {literal(')')}"]
        for j, (key, value) in enumerate(properties.items()):
            self.parts[f"args_{i}_{j}"] = schema_part(
                {**shared, **value} if isinstance(value, Mapping) else value, tool.param
            )
            for state, comma in (("first", ""), ("next", ", ")):
                given = f"{literal(f'{comma}{key}=')} @args_{i}_{j} {name}_next_{j + 1}"
                left = "" if key in required else f" | {name}_{state}_{j + 1}"
                lines.append(f"{name}_{state}_{j}: {given}{left}")
        return [*lines, *(f'{name}_{state}_{len(properties)}: ""' for state in ("first", "next"))]

    def _pieces(self, pieces: Sequence[str]) -> str:
        return " ".join(self._piece(piece) for piece in pieces)

    def _piece(self, piece: str) -> str:
        return marked(self._tokenizer, piece)


def marked(tokenizer: TextTokenizer, text: str) -> str:
    """A text as Lark writes it, or the control token that it is."""
    number = special_id(tokenizer, text)
    return literal(text) if number is None else f"<[{number}]>"
