"""The grammar of one tool call written in tags: its arguments in the order of their schema, texts bare, all else as JSON.

Knows tags, schemas and Lark. What a schema says of a text is kept where a grammar can say it of bare text (`enum`, `const`,
`pattern`, the lengths); `format` is an annotation, as the standard has it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .argument_text import TEXT, kinds_of, target
from .errors import Invalid
from .grammar import Parts, literal, one_of
from .tool_formats import Tags
from .tools import Tool

MAX_FREE_ARGUMENTS = 8
"""Most arguments of a tool whose schema names none."""
_MOST_BRANCHES = 8
"""How deep `anyOf` and `$ref` are followed; what lies deeper may be any text."""


class TagRules:
    """The rules of `call_{i}`."""

    def __init__(self, tags: Tags, i: int, tool: Tool, piece: Callable[[str], str], parts: Parts) -> None:
        """Raises Invalid for a schema that cannot be used. `piece`: writes a tag in Lark. `parts`: gets what rules refer to."""
        self._tags, self._tool, self._piece, self._parts = tags, tool, piece, parts
        self._name = f"call_{i}"
        self._close = f"{literal(chr(10)) if tags.lines else ''} {piece(tags.value_close)}"
        self.lines: list[str] = []
        self._kinds: dict[int, frozenset[str]] = {}
        """Types of what `$ref`s lead to, by id."""
        self._referred: dict[int, str] = {}
        """The rule of what they lead to, by id; none while it is made."""
        self._texts: set[str] = set()
        """Rules of texts."""
        arguments = " ".join(self._arguments())
        opening = literal(tool.name + (f"{tags.name_close}\n" if tags.lines else "\n"))
        end = piece(tags.end) if tags.own_end else ""
        self.lines.append(f"{self._name}: {opening} {arguments} {end}")

    def _arguments(self) -> Iterator[str]:
        schema = self._tool.parameters
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            argument = self._argument(r"/[^<>\n]+/", self._text())
            yield f"({argument}){{0,{MAX_FREE_ARGUMENTS}}}"
            return
        required: Sequence[str] = schema.get("required") or ()
        named = {**properties, **{key: True for key in required if key not in properties}}
        for j, (key, value) in enumerate(named.items()):
            if any(char in key for char in "<>\n"):
                raise Invalid(
                    f"`{self._tool.param}` has a property {key[:50]!r}, which this model cannot write in a call",
                    param=self._tool.param,
                )
            rule = f"{self._name}_{j}"
            values = self._one_of(value, str(j), 0)
            self.lines.append(f"{rule}: {self._argument(literal(key), values)}")
            yield rule if key in required else f"{rule}?"

    def _argument(self, key: str, value: str) -> str:
        opening = self._piece(self._tags.value_open) if self._tags.value_open else ""
        newline = literal("\n")
        return (
            f"{self._piece(self._tags.key_open)} {key} {self._piece(self._tags.key_close)} {newline} "
            f"{opening} {value} {newline}"
        )

    def _one_of(self, schema: Any, place: str, depth: int) -> str:
        """What a value may be, its closing tag included."""
        return one_of([*dict.fromkeys(self._values(schema, place, depth))])

    def _behind(self, schema: Any, depth: int) -> str:
        """The rule of what a `$ref` leads to. Many may lead to one, so each is written once; one that leads back to itself may be
        any text."""
        if id(schema) not in self._referred:
            self._referred[id(schema)] = ""
            place = f"ref_{len(self._referred)}"
            self.lines.append(f"{self._name}_{place}: {self._one_of(schema, place, depth)}")
            self._referred[id(schema)] = f"{self._name}_{place}"
        return self._referred[id(schema)] or self._text()

    def _values(self, schema: Any, place: str, depth: int) -> Iterator[str]:
        """The same, one alternative each."""
        root = self._tool.parameters
        if isinstance(schema, Mapping) and "$ref" in schema and depth < _MOST_BRANCHES:
            yield self._behind(target(schema["$ref"], root), depth + 1)
            return
        kinds = kinds_of(schema, root, self._kinds)
        if not isinstance(schema, Mapping) or depth >= _MOST_BRANCHES:
            yield self._text()
        elif "string" not in kinds:
            shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
            name = f"args_{self._name}_{place}"
            self._parts.add(name, {**shared, **schema}, self._tool.param)
            yield f"@{name} {self._close}"
        elif "const" in schema or isinstance(schema.get("enum"), list):
            for value in [schema["const"]] if "const" in schema else schema["enum"]:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                yield f"{literal(text)} {self._close}"
        elif kinds == TEXT:
            yield self._text(place, *_bounds(schema))
        elif isinstance(kind := schema.get("type"), list):
            for k, one in enumerate(("string", [other for other in kind if other != "string"])):
                yield from self._values({**schema, "type": one}, f"{place}_{k}", depth + 1)
        elif isinstance(schemas := schema.get("anyOf", schema.get("oneOf")), list):
            for k, inner in enumerate(schemas):
                yield from self._values(inner, f"{place}_{k}", depth + 1)
        else:
            yield self._text()

    def _text(self, place: str = "", *bounds: str) -> str:
        """A rule of any text within the bounds that it has at a place, and the tag behind it."""
        rule = f"{self._name}_text_{place if bounds else 'any'}"
        if rule in self._texts:
            return rule
        self._texts.add(rule)
        terminal, closing = rule.upper(), re.escape(self._tags.value_close).replace("/", r"\/")
        # It ends where the tag does, which a lazy rule sees to; a control token is no text, and ends it anyway.
        lazy = "" if self._piece(self._tags.value_close).startswith("<[") else "[lazy]"
        within = " & ".join([r"/(.|\n)*/", rf"~/(.|\n)*{closing}(.|\n)*/", *bounds])
        self.lines += [f"{terminal}: {within}", f"{rule}{lazy}: {terminal} {self._close}"]
        return rule


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    """What a schema says of a text, as regular expressions in Lark."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        yield rf"/(.|\n){{{least},{most}}}/"
    if isinstance(pattern := schema.get("pattern"), str):
        anchored = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
        inner = pattern[anchored[0] : len(pattern) - anchored[1]]
        # A slash would end it in Lark, but for a backslash before it, which JavaScript has written already.
        inner = re.sub(r"(?s)\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], inner)
        before, after = ("" if anchor else r"(.|\n)*" for anchor in anchored)
        yield f"/{before}({inner}){after}/"
