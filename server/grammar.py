"""A `Form`, tools to call and room to think → one text that llguidance understands. Knows grammars; no request, no engine.

What a client gives is kept in a grammar of its own, which the first refers to by name, so that no rule of one can meet a rule
of another. JSON may be written compactly or indented, but white space is bounded and an object that lists its properties
gets no others: a small model would go on with either for ever.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import orjson

from ..engine import MAX_GRAMMAR_BYTES
from .errors import Invalid
from .forms import Form

WHITESPACE = r"[ ]|\n[ ]{0,24}"
"""What may stand between two tokens of JSON."""
_COMPOSED = (
    "allOf",
    "if",
    "not",
    "dependentSchemas",
    "unevaluatedProperties",
    "unevaluatedItems",
    "$dynamicRef",
)
_ALTERNATIVES = ("anyOf", "oneOf", "$ref")
_SAYS_WHAT = ("type", "enum", "const", "allOf", *_ALTERNATIVES)
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_OPENS = ("additionalProperties", "patternProperties", *_ALTERNATIVES)

Part = Mapping[str, Any]
"""One of llguidance's grammars: `{"json_schema": …}` or `{"lark_grammar": …}`."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules and what they refer to."""

    rules: str
    """In Lark, the first is `start`."""
    parts: Mapping[str, Part]
    """By the name that `@name` refers to."""

    def text(self) -> str:
        """As llguidance reads it."""
        named = [{"name": name, **part} for name, part in self.parts.items()]
        return orjson.dumps({"grammars": [{"name": "answer", "lark_grammar": self.rules}, *named]}).decode()


class Parts(dict[str, Part]):
    """Grammars of the arguments of tools, by the name that `@name` refers to.

    Each argument takes along all that its tool defines, so that a small tool can make a large grammar: their size is watched while
    they are made.
    """

    _bytes = 0

    def add(self, name: str, schema: Any, param: str) -> None:
        """The grammar of a schema. Raises Invalid."""
        self[name] = schema_part(schema, param)
        self._bytes += len(orjson.dumps(self[name]["json_schema"]))
        if self._bytes > MAX_GRAMMAR_BYTES:
            raise Invalid(
                f"`{param}` makes a grammar of more than {MAX_GRAMMAR_BYTES} bytes, the most there can be; "
                "it needs fewer properties, or less in `$defs`",
                param=param,
            )


def part_of(form: Form) -> Part:
    """The grammar of a form. Raises Invalid."""
    match form.kind:
        case "json":
            return schema_part(form.value, form.param)
        case "regex":
            return lark_part(_lark_regex(form.value))
        case "choice":
            return lark_part("start: " + " | ".join(literal(text) for text in form.value))
        case "grammar":
            return lark_part(_lark_of(form))


def schema_part(schema: Any, param: str) -> Part:
    """The grammar of all JSON that a schema allows. Raises Invalid."""
    try:
        text = orjson.dumps(schema)
    except TypeError as error:
        raise Invalid(f"`{param}` is not valid: {error}", param=param) from None
    if not isinstance(schema, Mapping):
        return {"json_schema": schema}
    if "properties" in schema and not any(word in schema for word in _SAYS_WHAT):
        # By the letter it would allow all that is no object too, which nobody means who lists properties.
        schema = {"type": "object", **schema}
    composed = any(b'"%s"' % word.encode() in text for word in _COMPOSED)
    closed = schema if composed else _closed(schema)
    return {
        "json_schema": {**closed, "x-guidance": {"whitespace_pattern": WHITESPACE, "coerce_one_of": True}}
    }


def lark_part(rules: str) -> Part:
    """A grammar in Lark."""
    return {"lark_grammar": rules}


def literal(text: str) -> str:
    """A text, as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def one_of(rules: Sequence[str]) -> str:
    """Rules of which one is chosen."""
    return rules[0] if len(rules) == 1 else f"({' | '.join(rules)})"


def _lark_regex(regex: str) -> str:
    return json.loads(llguidance.LLMatcher.grammar_from_regex(regex))["grammars"][0]["lark_grammar"]


def _lark_of(form: Form) -> str:
    """Lark, or what llama.cpp writes (GBNF)."""
    try:
        return llguidance.grammar_from("grammar", form.value)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"`{form.param}` is not valid: {error}", param=form.param) from None


def _closed(schema: Any) -> Any:
    """The schema with its objects closed that list their properties and say nothing of others.

    What matches it matches the schema. Where keywords have to hold together, or a property is required that is not listed, a closed
    one could leave nothing to match; such an object stays as it is, and schemas that compose (`allOf` …) are not brought here.
    """
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            found[key] = {name: _closed(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties"):
            found[key] = _closed(value)
        elif key in ("anyOf", "oneOf", "prefixItems") and isinstance(value, Sequence):
            mixed = key != "prefixItems" and "properties" in schema
            found[key] = value if mixed else [_closed(inner) for inner in value]
        else:
            found[key] = value
    if _lists_all(schema) and not any(key in schema for key in _OPENS):
        found["additionalProperties"] = False
    return found


def _lists_all(schema: Mapping[str, Any]) -> bool:
    """Whether an object lists its properties, those that it requires among them."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return all(isinstance(key, str) and key in properties for key in required)
