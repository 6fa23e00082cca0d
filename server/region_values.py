"""What the text of a field holds, in the words of a response template: `json`, `xml-inline` … and the shape it is given.

Knows the eight ways of reading that templates name, and their transforms; no delimiters, no streams.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import regex

from .call_scan import PythonScan

_PLACE = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_QUOTED = r'"(?:\\.|[^"\\])*"'
_BARE_KEY = r"(?<=[{,])(?P<before>\s*)(?P<key>\w+)(?P<after>\s*):"
_CALL_NAME = re.compile(r"[A-Za-z_]\w*(?:[-.]\w+)*", re.ASCII)


def content_of(text: str, kind: str, arguments: Mapping[str, Any]) -> Any:
    """The value of a field's text, read in one of the ways of CONTENTS. Raises ValueError, TypeError or LookupError."""
    return CONTENTS[kind](text, arguments)


def shaped(value: Any, transform: Any, each: bool, captured: Mapping[str, str]) -> Any:
    """A value in the shape of a transform. Raises ValueError, TypeError or LookupError.

    Args:
        value: what was read; `{content}` in the transform.
        transform: the shape; None leaves the value as it is.
        each: whether it is that of each element of a list, whose keys it names.
        captured: groups of the field's delimiters, by name.
    """
    if transform is None:
        return value
    if not each:
        return _filled(transform, {**captured, "content": value})
    if not isinstance(value, list):
        raise TypeError("`transform_each` needs a list")
    return [_filled(transform, {**captured, **element}) for element in value]


def check_transform(transform: Any) -> None:
    """Raises ValueError for a place with something round it, which would be text that nobody filled in."""
    for text in _texts(transform):
        if _PLACE.search(text) and not _PLACE.fullmatch(text):
            raise ValueError(f"{text!r} must be one {{place}} and nothing else, or no place at all")


def place_of(transform: Any) -> tuple[str, ...]:
    """`{a.b}` → ("a", "b"); empty for what is no place."""
    found = _PLACE.fullmatch(transform) if isinstance(transform, str) else None
    return () if found is None else tuple(found[1].split("."))


def _texts(transform: Any) -> Iterator[str]:
    if isinstance(transform, str):
        yield transform
    elif isinstance(transform, Mapping | list):
        for inner in transform.values() if isinstance(transform, Mapping) else transform:
            yield from _texts(inner)


def _filled(transform: Any, scope: Mapping[str, Any]) -> Any:
    if isinstance(transform, Mapping):
        return {key: _filled(inner, scope) for key, inner in transform.items()}
    if isinstance(transform, list):
        return [_filled(inner, scope) for inner in transform]
    if not (steps := place_of(transform)):
        return transform
    value: Any = scope
    for step in steps:
        value = value[step]
    return value


def _text(text: str, arguments: Mapping[str, Any]) -> str:
    return text.strip() if arguments.get("strip", True) else text


def _bool(text: str, arguments: Mapping[str, Any]) -> bool:
    return _text(text, arguments).lower() in ("true", "1")


def _json(text: str, arguments: Mapping[str, Any]) -> Any:
    """JSON, or what models write for it: keys without quotes, texts between marks of their own."""
    marks: list[tuple[str, str]] = arguments.get("string_delims") or []
    quoted = [rf"{re.escape(a)}(?P<text_{i}>.*?){re.escape(b)}" for i, (a, b) in enumerate(marks)]
    alternatives = [*quoted, _QUOTED, *([_BARE_KEY] if arguments.get("unquoted_keys") else [])]
    try:
        return json.loads(re.sub("|".join(alternatives), _standard, text, flags=re.DOTALL))
    except ValueError:
        if arguments.get("allow_non_json"):
            return _text(text, arguments)
        raise


def _standard(match: re.Match[str]) -> str:
    """What was found, as JSON has it."""
    groups = {name: value for name, value in match.groupdict().items() if value is not None}
    if "key" in groups:
        return f'{groups["before"]}"{groups["key"]}"{groups["after"]}:'
    return next((json.dumps(value) for value in groups.values()), match[0])


def _tags(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`<parameter=a>1</parameter>`…: whatever the pattern captures as `key` and `value`."""
    found: dict[str, Any] = {}
    several: set[str] = set()
    for match in regex.finditer(arguments["tag_pattern"], text, flags=regex.DOTALL):
        groups = match.groupdict()
        key, value = groups["key"], _inner(groups.get("value") or "", arguments)
        if key not in found or not arguments.get("merge_duplicates"):
            found[key] = value
        elif key in several:
            found[key].append(value)
        else:
            found[key] = [found[key], value]
            several.add(key)
    return found


def _lines(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`a: 1`, a line each."""
    found: dict[str, Any] = {}
    for line in text.split(arguments.get("line_sep", "\n")):
        key, separator, value = line.partition(arguments.get("kv_sep", ":"))
        if separator:
            found[_text(key, arguments)] = _inner(_text(value, arguments), arguments)
    return found


def _inner(text: str, arguments: Mapping[str, Any]) -> Any:
    reading = arguments.get("value_parser")
    return text if reading is None else content_of(text, reading.get("name", "text"), reading.get("args", {}))


def _calls(text: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`[f(a=1), g()]`."""
    rest, found = text.strip(), []
    if not rest.startswith("[") or not rest.endswith("]"):
        raise ValueError("a list of calls stands in brackets")
    rest = rest[1:-1].strip()
    while rest:
        name = _CALL_NAME.match(rest)
        if name is None:
            raise ValueError(f"no call begins with {rest[:20]!r}")
        scan, end = PythonScan(frozenset({name[0]})), 0
        scanned = scan.feed(rest[0])
        while not (scanned.done or scanned.failed) and end + 1 < len(rest):
            end += 1
            scanned = scan.feed(rest[end])
        if not scanned.done:
            raise ValueError(f"{rest[:20]!r} begins no whole call with keywords")
        found.append({"name": scanned.name, "arguments": json.loads(scanned.arguments)})
        rest = rest[end + 1 :].lstrip()
        if rest and not rest.startswith(","):
            raise ValueError("calls stand between commas")
        if rest and not (rest := rest[1:].lstrip()):
            raise ValueError("a call is missing behind the last comma")
    return found


CONTENTS: Mapping[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "text": _text,
    "int": lambda text, arguments: int(_text(text, arguments)),
    "float": lambda text, arguments: float(_text(text, arguments)),
    "bool": _bool,
    "json": _json,
    "xml-inline": _tags,
    "kv-lines": _lines,
    "python-call-list": _calls,
}
"""Ways of reading, by the name that templates call them."""
