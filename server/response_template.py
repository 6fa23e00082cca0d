"""A response template, which a model's tokenizer_config.json may declare: the fields of its answers, and what they begin and end with.

The inverse of a chat template, as transformers has it since its version 5 (`response_template`, version 1 of its format). It is
data, so it is read here, whichever transformers is installed. What is not understood is refused by name. Knows the format only:
answers are read by `region_scan.py`, what fields hold by `region_values.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

from .region_values import CONTENTS, check_transform

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields that are thinking, as authors of templates call it."""
TOOL_CALLS = "tool_calls"
_VERSION = 1
_TOP = frozenset({"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"})
_OF_FIELD = frozenset(
    {
        *("open", "open_pattern", "close", "close_pattern", "content", "content_args"),
        *("repeats", "join", "optional", "transform", "transform_each"),
    }
)


class TemplateUnreadable(ValueError):
    """A response template that this server does not understand, and why."""


@dataclass(frozen=True, slots=True)
class Delimiter:
    """What a field begins or ends with."""

    pattern: regex.Pattern[str]
    source: str = ""
    """The pattern, where it is one."""
    literals: tuple[str, ...] = ()
    """The texts it is one of, where it is no pattern."""

    @property
    def grows(self) -> bool:
        """Whether one that is there may yet become a longer one."""
        return not self.literals or any(
            a != b and a.startswith(b) for a in self.literals for b in self.literals
        )


@dataclass(frozen=True, slots=True)
class Field:
    """One part of an answer."""

    name: str
    open: Delimiter | None
    """None for the part that is whatever stands outside of the others."""
    close: Delimiter | None
    """None if it ends with the answer."""
    content: str = "text"
    """How its text is to be read: one of `region_values.CONTENTS`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What that reading takes."""
    join: str = "\n"
    """What stands between two parts of this name, which transformers knows of where the template says it."""
    transform: Any = None
    """The shape of its value, with `{places}` for what was read."""
    each: bool = False
    """Whether the transform is that of each element of a list."""

    @property
    def thinks(self) -> bool:
        """Whether it is thinking."""
        return self.name in REASONING

    @property
    def calls(self) -> bool:
        """Whether it is calls of tools."""
        return self.name == TOOL_CALLS


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """All of it."""

    fields: tuple[Field, ...]
    anchor: Delimiter
    """Behind the last of these in a prompt, the answer begins."""

    @property
    def outside(self) -> Field | None:
        """The field of what stands outside of the others; without one that is no part of the message."""
        return next((each for each in self.fields if each.open is None), None)

    def field(self, *names: str) -> Field | None:
        """The first field of one of these names."""
        return next((each for each in self.fields if each.name in names), None)

    def begun(self, prompt: str) -> str:
        """What a prompt says of the answer already; all before it belongs to earlier messages."""
        ends = [match.end() for match in self.anchor.pattern.finditer(prompt)]
        return prompt[ends[-1] :] if ends else ""


def read_template(value: Any) -> ResponseTemplate:
    """A template from its JSON. Raises TemplateUnreadable."""
    spec = _object(value, "response_template")
    _known(spec, _TOP, "response_template")
    if (version := spec.get("version", _VERSION)) != _VERSION:
        raise TemplateUnreadable(f"response_template.version must be {_VERSION}. Given: {version!r}")
    # What a message has anyway (its role) is nothing that an answer says.
    _object(spec.get("defaults", {}), "defaults")
    given = _object(spec.get("fields"), "fields")
    if not given:
        raise TemplateUnreadable("`fields` must not be empty")
    fields = tuple(_field(name, value) for name, value in given.items())
    outside = [each.name for each in fields if each.open is None]
    if len(outside) > 1:
        raise TemplateUnreadable(f"only one field may have no `open`. Given: {', '.join(outside)}")
    anchor = _delimiter(spec, "start_anchor", "start_anchor_pattern", "response_template")
    if anchor is None:
        raise TemplateUnreadable("`start_anchor` or `start_anchor_pattern` is missing")
    return ResponseTemplate(fields, anchor)


def _field(name: str, value: Any) -> Field:
    place = f"fields.{name}"
    spec = _object(value, place)
    _known(spec, _OF_FIELD, place)
    content, transform = spec.get("content", "text"), spec.get("transform")
    if content not in CONTENTS:
        raise TemplateUnreadable(f"{place}.content must be one of {', '.join(CONTENTS)}. Given: {content!r}")
    try:
        check_transform(transform)
    except ValueError as error:
        raise TemplateUnreadable(f"{place}.transform: {error}") from None
    return Field(
        name,
        _delimiter(spec, "open", "open_pattern", place),
        _delimiter(spec, "close", "close_pattern", place),
        content,
        _object(spec.get("content_args", {}), f"{place}.content_args"),
        str(spec.get("join", "\n")),
        transform,
        spec.get("transform_each", False) is True,
    )


def _delimiter(spec: Mapping[str, Any], literal: str, pattern: str, place: str) -> Delimiter | None:
    if literal in spec and pattern in spec:
        raise TemplateUnreadable(f"{place}: `{literal}` and `{pattern}` exclude each other")
    if pattern in spec:
        source = spec[pattern]
        try:
            return Delimiter(regex.compile(source, regex.DOTALL), source)
        except (regex.error, TypeError) as error:
            raise TemplateUnreadable(f"{place}.{pattern}: {error}") from None
    if literal not in spec:
        return None
    texts = [spec[literal]] if isinstance(spec[literal], str) else spec[literal]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise TemplateUnreadable(f"{place}.{literal} must be a text, or a list of texts, none of them empty")
    # Of two that begin alike the longer one is meant where it stands.
    longest_first = sorted(texts, key=len, reverse=True)
    alternatives = "|".join(regex.escape(text) for text in longest_first)
    return Delimiter(regex.compile(alternatives), literals=tuple(texts))


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TemplateUnreadable(f"`{place}` must be an object")
    return value


def _known(spec: Mapping[str, Any], known: frozenset[str], place: str) -> None:
    if unknown := sorted(set(spec) - known):
        raise TemplateUnreadable(f"`{place}` has keys that are not understood: {', '.join(unknown)}")
