"""The grammar of calls: a format and the tools that may be called → rules in Lark. Knows grammars; parsing is `tool_parser.py`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import Unsupported
from .grammar import Parts, literal, one_of
from .tag_rules import TagRules
from .text import TextTokenizer
from .tool_formats import ToolFormat
from .tools import Tool, ToolUse

MAX_CALLS = 8
"""Most calls of one answer that a grammar has to hold; a small model would not end by itself."""
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class CallRules:
    """The rules of calls in one format, as lines of Lark, and the grammars of their arguments."""

    def __init__(self, form: ToolFormat, use: ToolUse, tokenizer: TextTokenizer) -> None:
        """Raises Invalid for a schema that cannot be used, Unsupported if calls of this model cannot be written."""
        if form.syntax == "other":
            raise Unsupported(
                "this model's response template tells how calls are read, not how they are written, so no tool can be required of it, "
                "strict, or the only one of an answer",
                param="tools",
            )
        self._form = form
        self._tokenizer = tokenizer
        self._lines: list[str] = []
        self.parts = Parts()
        names = [self._call(i, tool) for i, tool in enumerate(use.allowed)]
        self._lines.append(f"call: {one_of(names)}")
        more = self._more(MAX_CALLS - 1) if use.parallel else ""
        self._lines.append(f"calls: {self._pieces(form.opening)} call{more} {self._pieces(form.closing)}")
        # The same behind a mark that has been written already.
        for i, mark in enumerate(form.marks):
            behind = form.opening[form.opening.index(mark) + 1 :] if mark in form.opening else ()
            self._lines.append(f"rest_{i}: {self._pieces(behind)} call{more} {self._pieces(form.closing)}")

    def required(self) -> str:
        """Rules of `answer`: calls and nothing else."""
        return self._rules("answer: calls")

    def chosen(self, otherwise: str = "", text_open: str = "") -> str:
        """Rules of `answer`: calls behind a free text, or that text alone, or calls or what `otherwise` names. `text_open`: what
        a text begins with, if it needs that; then it stands alone."""
        begin = self._piece(text_open) if text_open else ""
        if otherwise:
            return self._rules(f"answer: calls | {begin} {otherwise}")
        if begin:
            return self._rules(f"answer: calls | {begin} SAID", r"SAID: /(.|\n)*/")
        if self._form.bare:
            first = rf"[^\s\{self._form.bare}]"
            return self._rules("answer: calls | SAID?", rf"SAID: /{first}(.|\n)*/")
        # A text ends where a mark does, which a lazy rule sees to; a control token is no text, and ends it anyway.
        marks = [self._piece(mark) for mark in self._form.marks]
        heads = [
            f"head_{i}{'' if mark.startswith('<[') else '[lazy]'}: SAID {mark}"
            for i, mark in enumerate(marks)
        ]
        calls = " | ".join(f"head_{i} rest_{i}" for i in range(len(marks)))
        return self._rules(f"answer: {calls} | said", "said: SAID", *heads, r"SAID: /(.|\n)*/")

    def _rules(self, *lines: str) -> str:
        return "\n".join([*lines, *self._lines])

    def _more(self, most: int) -> str:
        return f" ({self._pieces(self._form.between)} call){{0,{most}}}"

    def _call(self, i: int, tool: Tool) -> str:
        name, key = f"call_{i}", self._form.arguments
        if self._form.tags is not None:
            rules = TagRules(self._form.tags, i, tool, self._piece, self.parts)
            self._lines += rules.lines
            return name
        if self._form.syntax == "python":
            self._lines += self._python(name, i, tool)
            return name
        self.parts.add(f"args_{i}", tool.parameters, tool.param)
        if self._form.syntax == "named":
            self._lines.append(f"{name}: {literal(tool.name)} {self._piece(self._form.name_close)} @args_{i}")
        else:
            opening = f'{{"{self._form.name}": {literal(tool.name)}, "{key}": '
            self._lines.append(f"{name}: {literal(opening)} @args_{i} {literal('}')}")
        return name

    def _python(self, name: str, i: int, tool: Tool) -> list[str]:
        """`f(a=1, b="c")`, the arguments in the order of the schema; what Python cannot name goes through `**`."""
        schema = tool.parameters
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not all(_IDENTIFIER.fullmatch(key) for key in properties):
            self.parts.add(f"args_{i}", schema, tool.param)
            return [f"{name}: {literal(f'{tool.name}(**')} @args_{i} {literal(')')}"]
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required: Sequence[Any] = schema.get("required") or ()
        lines = [f"{name}: {literal(tool.name + '(')} {name}_first_0 {literal(')')}"]
        for j, (key, value) in enumerate(properties.items()):
            whole = {**shared, **value} if isinstance(value, Mapping) else value
            self.parts.add(f"args_{i}_{j}", whole, tool.param)
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
    """A text as Lark writes it, with the control tokens in it."""
    written: list[str] = []
    for number in tokenizer.encode(text, False):
        if tokenizer.is_special(number):
            before, _, text = text.partition(tokenizer.token_text(number))
            written += [*([literal(before)] if before else []), f"<[{number}]>"]
    return " ".join([*written, *([literal(text)] if text or not written else [])])
