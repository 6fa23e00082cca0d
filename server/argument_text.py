"""Arguments that a model writes as bare text, each by its own schema → JSON. Knows schemas and values; no syntax of calls.

Models that write calls in tags write a text without quotes and everything else as JSON, or as Python would print it. Which of
the two a value is, its schema says; where the schema leaves both open, what reads as JSON is JSON.
"""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

KINDS = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
"""The types of JSON; every integer is a number as well."""
TEXT = frozenset({"string"})
_MOST_REFERENCES = 8
"""Longest chain of `$ref`s that is followed."""
_WORDS = {"true": True, "false": False, "null": None}


def kinds_of(
    schema: Any, root: Mapping[str, Any], known: dict[int, frozenset[str]] | None = None
) -> frozenset[str]:
    """Types that a schema allows. Takes time that grows with its size.

    Args:
        schema: of one value.
        root: where its `$ref`s lead.
        known: what was found where they lead to, by id; for whoever asks about several schemas within one root.
    """
    return _kinds(schema, root, {} if known is None else known, 0)


def _kinds(
    schema: Any, root: Mapping[str, Any], known: dict[int, frozenset[str]], depth: int
) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > _MOST_REFERENCES:
        return KINDS
    found = KINDS
    if "$ref" in schema:
        behind = target(schema["$ref"], root)
        # Many may lead to one, so each is followed once; one that leads back to itself says nothing.
        if id(behind) not in known:
            known[id(behind)] = KINDS
            known[id(behind)] = _kinds(behind, root, known, depth + 1)
        found &= known[id(behind)]
    if "type" in schema:
        found &= frozenset(kind for name in _several(schema["type"]) for kind in _with_integers(name))
    if "const" in schema:
        found &= frozenset(_with_integers(kind_of(schema["const"])))
    if isinstance(values := schema.get("enum"), list):
        found &= frozenset(kind for value in values for kind in _with_integers(kind_of(value)))
    for word in ("anyOf", "oneOf"):
        if isinstance(schemas := schema.get(word), list):
            found &= frozenset().union(*(_kinds(inner, root, known, depth + 1) for inner in schemas))
    if isinstance(schemas := schema.get("allOf"), list):
        for inner in schemas:
            found &= _kinds(inner, root, known, depth + 1)
    return found


def target(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a `$ref` within a schema leads to; None if that is nothing."""
    found: Any = root
    for step in str(reference).removeprefix("#").split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def argument_json(text: str, kinds: frozenset[str]) -> str:
    """The JSON of a value: of one of these types, if it can be one of them, else of whatever it is."""
    if kinds == TEXT:
        return as_json(text)
    found = _value(text)
    if found is None:
        return as_json(text)
    kind, written = found
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    # A text in quotes was meant to have them, where a text may stand.
    return sound(written) if (fits and kind != "string") or "string" not in kinds else as_json(text)


def as_json(value: Any) -> str:
    """A value as JSON. Raises ValueError for a number that JSON cannot say."""
    return sound(json.dumps(value, ensure_ascii=False, allow_nan=False))


def sound(text: str) -> str:
    """JSON as UTF-8 can carry it: a half of a character, which an escape can make, is written as that escape again."""
    return text.encode(errors="backslashreplace").decode()


def plain(node: ast.expr) -> Any:
    """The value of a Python literal. Raises ValueError for any other expression."""
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.Name(id=("true" | "false" | "null") as word):
            return _WORDS[word]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [plain(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            # A key of None stands for `**`.
            return {_key(key): plain(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def kind_of(value: Any) -> str:
    """The type of a JSON value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
    return "object" if isinstance(value, Mapping) else "array"


def _value(text: str) -> tuple[str, str] | None:
    """The type and the JSON of a value in JSON or Python; None if it is neither."""
    try:
        return kind_of(json.loads(text, parse_constant=_refuse)), text.strip()
    except (ValueError, RecursionError):
        pass
    try:
        value = plain(ast.parse(text.strip(), mode="eval").body)
        return kind_of(value), json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Python 3.11 has a SystemError for some trees that are too deep.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, SystemError):
        return None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("not a text")


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _with_integers(kind: Any) -> Iterator[str]:
    yield str(kind)
    if kind == "number":
        yield "integer"
