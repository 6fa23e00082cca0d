"""What a model's response template makes of it: what to keep of its text, and how to write what it would read. No streams, no API.

A grammar of calls needs what stands round them as texts. Where the template has a pattern instead, a text that it matches is
worked out, for such patterns as templates have; where that fails there is no grammar, and what needs one is refused.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import regex

from .reasoning import Markers
from .region_scan import RegionScan
from .region_values import place_of
from .response_template import (
    REASONING,
    TOOL_CALLS,
    Delimiter,
    Field,
    ResponseTemplate,
    TemplateUnreadable,
    read_template,
)
from .text import TextTokenizer
from .tool_formats import PLAIN, Tags, ToolFormat

logger = logging.getLogger(__name__)

UNKNOWN = ToolFormat(syntax="other", opening=(), between=())
"""Of calls that can be read but not written: no grammar can be made of them."""
_PIECE = re.compile(
    r"""\(\?P<(?P<group>\w+)>(?:[^()\\]|\\.)*\)  # captured
    |(?:\\s|\.|\(\?:(?:[^()\\]|\\.)*\)|\[(?:[^\]\\]|\\.)*\]|\\?[^()\[\]])[*?]\??  # what need not be there
    |(?P<space>\\s\+?\??)
    |\\(?P<letter>[nt])
    |\\(?P<escaped>[^\w\s])
    |(?P<plain>[^\\()\[\]{}*+?.^$|])""",
    re.VERBOSE | re.DOTALL,
)
_LETTERS = {"n": "\n", "t": "\t"}
_GROUP = re.compile("\x00(\\w+)\x00")
"""A captured group in a text that a pattern matches."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A model that declares how its answers are to be read."""

    template: ResponseTemplate
    tool_format: ToolFormat
    """How to write calls: UNKNOWN if that cannot be told, PLAIN if the model knows none."""
    markers: Markers | None
    """What stands round its thinking, if it thinks and that can be told."""
    text_open: str
    """What its text begins with."""
    lead: str
    """What it may write between two fields."""
    kept_ids: frozenset[int]
    """Control tokens that are delimiters."""

    @property
    def thinks(self) -> bool:
        """Whether the model's answers have thinking."""
        return self.template.field(*REASONING) is not None

    def left_open(self, prompt: str) -> bool:
        """Whether the model goes on thinking after this prompt."""
        scan = RegionScan(self.template)
        scan.begin(prompt)
        return scan.region is not None and scan.region.field.thinks


def find_declared(tokenizer: TextTokenizer) -> Declared | None:
    """What a model declares of its answers; None if that is nothing, or cannot be understood."""
    if (spec := tokenizer.response_template) is None:
        return None
    try:
        template = read_template(spec)
    except TemplateUnreadable as error:
        logger.warning("the model's response template is not used: %s", error)
        return None
    calls, text, thinking = template.field(TOOL_CALLS), template.field("content"), template.field(*REASONING)
    form = PLAIN
    if calls is not None and "tools" in (tokenizer.tool_template or ""):
        form = format_of(calls) or UNKNOWN
    return Declared(
        template,
        form,
        None if thinking is None else _markers_of(thinking, tokenizer),
        "" if text is None else _written(text.open) or "",
        "" if template.outside is not None else _written(template.anchor) or "",
        _controls(_texts(template), tokenizer),
    )


def format_of(field: Field) -> ToolFormat | None:
    """How to write calls that this field would read; None if that cannot be told."""
    opening, closing = _written(field.open), _written(field.close)
    name, arguments = _places(field)
    if not opening or closing is None:
        return None
    before, *captured = _GROUP.split(opening)
    if captured[:1] == [*name] and len(captured) == 2 and arguments == ("content",):
        return _named(field, before, captured[1], closing)
    if captured or len(name) != len(arguments):
        return None
    if field.content == "python-call-list":
        form = ToolFormat(
            syntax="python", marks=(opening,), opening=(opening, "["), between=(", ",), closing=("]", closing)
        )
        return form if (name[-1:], arguments[-1:]) == (("name",), ("arguments",)) else None
    if field.content != "json" or len(name) != (1 if field.each else 2):
        return None
    form = ToolFormat(
        syntax="json", name=name[-1], arguments=arguments[-1], marks=(opening,), opening=(opening,),
        between=(closing, opening), closing=(closing,),
    )  # fmt: skip
    listed = {"opening": (opening, "["), "between": (", ",), "closing": ("]", closing)}
    return replace(form, **listed) if field.each else form


def _named(field: Field, before: str, behind: str, closing: str) -> ToolFormat | None:
    """Calls whose name stands in what opens them."""
    if field.content == "json" and not field.each and before:
        return ToolFormat(
            syntax="named", name_close=behind, marks=(before,), opening=(before,), between=(closing, before),
            closing=(closing,),
        )  # fmt: skip
    tags = _tags_of(field, behind, closing) if field.content == "xml-inline" and before else None
    return tags and ToolFormat(
        syntax="tags", tags=tags, marks=(before,), opening=(before,), between=(before,)
    )


def _tags_of(field: Field, name_close: str, end: str) -> Tags | None:
    pattern = str(field.arguments.get("tag_pattern", ""))
    parts = _GROUP.split(_matched(pattern) or "")
    if parts[1::2] != ["key", "value"] or not all(parts[0::2]):
        return None
    key_open, _, key_close, _, value_close = parts
    # A value has lines of its own here; one whose pattern would take them for a part of it cannot be written.
    found = regex.search(pattern, f"{key_open}a{key_close}\n1\n{value_close}", regex.DOTALL)
    if found is None or found.groupdict() != {"key": "a", "value": "1"}:
        return None
    return Tags(
        name_close=name_close,
        key_open=key_open,
        key_close=key_close,
        value_close=value_close,
        lines=True,
        end=end,
    )


def _places(field: Field) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where the transform takes a call's name and its arguments from."""
    transform = field.transform
    function = transform.get("function", transform) if isinstance(transform, Mapping) else transform
    if isinstance(function, Mapping):
        return place_of(function.get("name")), place_of(function.get("arguments"))
    return ("content", "name"), ("content", "arguments")


def _written(delimiter: Delimiter | None) -> str | None:
    """A text that a delimiter is, with \0name\0 for what it captures; empty for none, None if that cannot be told."""
    if delimiter is None:
        return ""
    return delimiter.literals[0] if delimiter.literals else _matched(delimiter.source)


def _matched(pattern: str) -> str | None:
    """A text that a pattern matches, with \0name\0 for what it captures; None if that cannot be told."""
    at, found = 0, ""
    while at < len(pattern):
        piece = _PIECE.match(pattern, at)
        if piece is None:
            return None
        at = piece.end()
        groups = {name: text for name, text in piece.groupdict().items() if text is not None}
        match groups:
            case {"group": name}:
                found += f"\0{name}\0"
            case {"space": _}:
                found += " "
            case {"letter": letter}:
                found += _LETTERS[letter]
            case {"escaped": text} | {"plain": text}:
                found += text
            case _:
                pass
    return found


def _markers_of(field: Field, tokenizer: TextTokenizer) -> Markers | None:
    opening, closing = _written(field.open), _written(field.close)
    if not opening or not closing:
        return None
    return Markers(opening, closing, _controls((opening, closing), tokenizer))


def _texts(template: ResponseTemplate) -> Iterator[str]:
    """What delimiters are made of; of patterns without what makes them such."""
    for field in template.fields:
        for delimiter in (field.open, field.close):
            if delimiter is not None:
                yield from delimiter.literals
                yield re.sub(r"\\(\W)", r"\1", delimiter.source)


def _controls(texts: Iterable[str], tokenizer: TextTokenizer) -> frozenset[int]:
    """The control tokens in these texts."""
    return frozenset(i for text in texts for i in tokenizer.encode(text, False) if tokenizer.is_special(i))
