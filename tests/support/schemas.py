"""JSON schemas of many kinds, as data. Each has short answers only: strings, numbers and arrays are bounded, so a small model
that rambles still comes to an end. Knows no server."""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

BOOL: Schema = {"type": "boolean"}
DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,6}$"}
COLOUR: Schema = {"enum": ["red", "green", "blue"]}


def thing(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """A closed object; all properties but the optional ones are required."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def array(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _scalars() -> Iterator[tuple[str, Schema]]:
    yield "boolean", BOOL
    yield "null", {"type": "null"}
    for values in (["a"], ["yes", "no"], ["", " ", "\n"], ['"', "\\", "/"], ["é", "日本", "🙂"], [1, 2, 30]):
        yield f"enum of {values}", {"enum": values}
    yield "enum of kinds", {"enum": ["x", 1, None, True, [1, 2], {"a": "b"}]}
    for value in ("fixed", 7, -1.5, None, False, [], {}, [1, ["a"]], {"a": {"b": []}}):
        yield f"const {value!r}", {"const": value}
    for least, most in ((0, 0), (0, 1), (5, 13), (-3, 3), (-120, -100), (99, 101), (0, 65535), (1000, 9999)):
        yield f"integer {least}..{most}", {"type": "integer", "minimum": least, "maximum": most}
    for above, below in ((0, 2), (-2, 1), (9, 11), (0, 1000)):
        bounds = {"exclusiveMinimum": above, "exclusiveMaximum": below}
        yield f"integer above {above} below {below}", {"type": "integer", **bounds}
    for step, least, most in ((5, 0, 95), (7, 10, 80)):
        yield (
            f"multiple of {step}",
            {"type": "integer", "minimum": least, "maximum": most, "multipleOf": step},
        )
    yield "types", {"type": ["boolean", "null"]}
    for least, most in ((0, 0), (1, 1), (0, 3), (2, 5), (8, 8)):
        yield f"string of {least}..{most}", {"type": "string", "minLength": least, "maxLength": most}


def _patterns() -> Iterator[tuple[str, Schema]]:
    patterns = [
        "^[a-z]{3}$", "^[A-Z][a-z]{1,8}$", "^[0-9]{4}$", "^(cat|dog|bird)$", "^a{2,4}b?$", "^[^a-z]{1,3}$",
        "^\\d{3}-\\d{4}$", "^#[0-9a-f]{6}$", "^v[0-9]\\.[0-9]\\.[0-9]$", "^[01]{8}$", "^(yes|no)( (yes|no)){0,2}$",
        "^\\+49[0-9]{5}$", "^[äöü]{1,2}$", "^\\{[a-z]\\}$",
    ]  # fmt: skip
    for pattern in patterns:
        yield f"pattern {pattern}", {"type": "string", "pattern": pattern}
    # Of a time, a second of 60 is right by its standard and wrong by some libraries, so times are left out.
    for name in ("date", "uuid", "ipv4", "ipv6"):
        yield f"format {name}", {"type": "string", "format": name}


def _arrays() -> Iterator[tuple[str, Schema]]:
    kinds = (("booleans", BOOL), ("digits", DIGIT), ("words", WORD), ("colours", COLOUR))
    for name, items in kinds:
        for least, most in ((0, 2), (1, 1), (2, 3)):
            yield f"{least}..{most} {name}", array(items, least, most)
    yield "no items", {"type": "array", "maxItems": 0}
    yield "matrix", array(array(DIGIT, 2, 2), 2, 2)
    yield "tuple", {"type": "array", "prefixItems": [WORD, DIGIT, BOOL], "items": False, "minItems": 3}
    yield "array of either", array({"anyOf": [DIGIT, COLOUR]}, 1, 3)
    yield "array of objects", array(thing(x=DIGIT, y=DIGIT), 1, 2)


def _objects() -> Iterator[tuple[str, Schema]]:
    yield "no properties", {"type": "object", "additionalProperties": False}
    for count in (1, 2, 3, 5):
        yield f"{count} digits", thing(**{f"field_{i}": DIGIT for i in range(count)})
    yield "each kind", thing(a=BOOL, b=DIGIT, c=WORD, d=COLOUR, e={"type": "null"}, f=array(BOOL, 0, 2))
    yield "one optional", thing(("nick",), name=WORD, nick=WORD)
    yield "all optional", thing(("a", "b"), a=DIGIT, b=BOOL)
    yield "nested", thing(outer=thing(middle=thing(inner=COLOUR)))
    yield "side by side", thing(left=thing(x=DIGIT), right=thing(x=DIGIT))
    yield "names to be escaped", thing(**{'a"b': DIGIT, "c\\d": DIGIT, "e f": DIGIT, "ü🙂": DIGIT})
    yield "array inside", thing(tags=array(WORD, 1, 2), scores=array(DIGIT, 2, 2))
    yield "described", {"title": "T", "description": "of a thing", **thing(a={"description": "one", **DIGIT})}
    yield "person", thing(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}, likes=COLOUR)
    yield "order in the schema", thing(zebra=BOOL, apple=BOOL, mango=BOOL)
    yield "deep", thing(a=thing(b=thing(c=thing(d=thing(e=BOOL)))))
    yield "uuid inside", thing(id={"type": "string", "format": "uuid"}, ok=BOOL)
    yield "date inside", thing(day={"type": "string", "format": "date"})
    yield "nullable", thing(value={"anyOf": [DIGIT, {"type": "null"}]})
    yield "types inside", thing(value={"type": ["boolean", "null"]})


def _compositions() -> Iterator[tuple[str, Schema]]:
    yield "one of", {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, BOOL]}
    yield "either array", {"anyOf": [array(DIGIT, 1, 2), array(BOOL, 1, 2)]}
    yield "enum in an array of objects", array(thing(colour=COLOUR, on=BOOL), 2, 2)
    yield "either inside", thing(value={"anyOf": [DIGIT, WORD, array(BOOL, 0, 1)]})
    yield "either scalar", {"anyOf": [DIGIT, WORD]}
    yield "either object", {"anyOf": [thing(a=DIGIT), thing(b=BOOL)]}
    tagged = [thing(kind={"const": "circle"}, r=DIGIT), thing(kind={"const": "square"}, side=DIGIT)]
    yield "tagged", {"anyOf": tagged}
    yield "all of", {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 8}]}
    defs = {"$defs": {"point": thing(x=DIGIT, y=DIGIT), "colour": COLOUR}}
    yield "reference", {**defs, "$ref": "#/$defs/point"}
    ref: Schema = {"$ref": "#/$defs/point"}
    yield "reference twice", {**defs, **thing(start=ref, end=ref)}
    yield "references in an array", {**defs, **array(ref, 1, 2)}
    yield "either reference", {**defs, "anyOf": [ref, {"$ref": "#/$defs/colour"}]}
    chain = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": BOOL}}
    yield "chain of references", {**chain, **thing(value={"$ref": "#/$defs/a"})}
    old = {"definitions": {"word": WORD}}
    yield "definitions of older drafts", {**old, **thing(value={"$ref": "#/definitions/word"})}


SCHEMAS: dict[str, Schema] = {
    name: schema
    for group in (_scalars, _patterns, _arrays, _objects, _compositions)
    for name, schema in group()
}
