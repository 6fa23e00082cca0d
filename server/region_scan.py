"""An answer, as it comes → the regions that a response template's delimiters cut it into. Knows patterns; no value, no API.

One region is open at a time: the field whose opening came last, until its closing comes, else the field of what stands
outside of the others. A delimiter counts when nothing that may follow can change it; until then it is held back.
How an answer is cut into pieces does not matter.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import regex

from .response_template import Delimiter, Field, ResponseTemplate

_CONTEXT_CHARS = 256
"""Most characters that patterns see before the place where they may match (`^` is the answer's beginning)."""
_KEPT_CHARS = 4096
"""Read text is forgotten in pieces of this length."""


@dataclass(slots=True)
class Region:
    """A part of the answer."""

    field: Field
    start: int
    """Where its text begins, in characters of the answer; below 0 if the prompt began it."""
    opening: str = ""
    """The text that opened it."""
    captured: dict[str, str] = dataclasses.field(default_factory=dict)
    """Groups of its delimiters, by name."""


class Said(NamedTuple):
    """Text of a region."""

    region: Region
    text: str
    start: int
    """Where it begins, in characters of the answer."""


class Ended(NamedTuple):
    """A region ends."""

    region: Region
    closing: str
    """The text that closed it; empty if the answer's end did, or the next region."""
    end: int
    """Where it ends, that text included, in characters of the answer."""


class _Found(NamedTuple):
    """A delimiter that is there."""

    field: Field
    opens: bool
    match: regex.Match[str]

    @property
    def rank(self) -> tuple[int, int, bool, str]:
        """The first to begin counts, of those the longest."""
        return self.match.start(), self.match.start() - self.match.end(), not self.opens, self.field.name


class RegionScan:
    """Scans one answer."""

    def __init__(self, template: ResponseTemplate) -> None:
        self._template = template
        self._text = ""
        self._at = 0
        """What comes before is read."""
        self._offset = 0
        """Characters of the answer before the text."""
        self._region: Region | None = None

    @property
    def region(self) -> Region | None:
        """The one that has begun and not ended."""
        return self._region

    def begin(self, prompt: str) -> list[Said | Ended]:
        """Read what the prompt says of the answer; call it first. The answer's characters are counted from behind it."""
        begun = self._template.begun(prompt)
        self._offset = -len(begun)
        return self.push(begun)

    def push(self, text: str, *, end: bool = False) -> list[Said | Ended]:
        """What became certain with this text. `end`: nothing follows."""
        self._text += text
        news = [*self._read(end)]
        if end and self._region is not None:
            news.append(self._end("", len(self._text)))
        self._forget()
        return news

    def _read(self, end: bool) -> Iterator[Said | Ended]:
        while True:
            found, certain = self._next(end)
            stop = certain if found is None else found.match.start()
            if stop > self._at:
                yield from self._say(stop)
            if found is None:
                return
            empty = self._region is None and not found.opens and not found.match[0]
            yield from self._pass(found)
            if empty:
                return  # a closing of no length, of nothing, would be found for ever

    def _say(self, stop: int) -> Iterator[Said]:
        text, start, self._at = self._text[self._at : stop], self._offset + self._at, stop
        outside = self._template.outside
        if self._region is None and outside is not None:
            self._region = Region(outside, start)
        if self._region is not None:
            yield Said(self._region, text, start)

    def _pass(self, found: _Found) -> Iterator[Ended]:
        """Go on behind a delimiter."""
        groups = {name: value for name, value in found.match.groupdict().items() if value is not None}
        start, self._at = found.match.span()
        if self._region is not None and found.opens:
            yield self._end("", start)
        elif self._region is not None:
            self._region.captured |= groups
            yield self._end(found.match[0], self._at)
        if found.opens:
            self._region = Region(found.field, self._offset + self._at, found.match[0], groups)

    def _end(self, closing: str, end: int) -> Ended:
        assert self._region is not None, "a region has begun"
        ended, self._region = self._region, None
        return Ended(ended, closing, self._offset + end)

    def _expected(self) -> Iterator[tuple[Field, bool, Delimiter]]:
        """The delimiters that may come now."""
        outside = self._template.outside
        current = outside if self._region is None else self._region.field
        if current is outside:
            for one in self._template.fields:
                if one.open is not None:
                    yield one, True, one.open
        if current is not None and current.close is not None:
            yield current, False, current.close

    def _next(self, end: bool) -> tuple[_Found | None, int]:
        """The first delimiter that is certain, if there is one before all that are not; and where the first of those begins."""
        best: _Found | None = None
        certain = len(self._text)
        for one, opens, delimiter in self._expected():
            match = delimiter.pattern.search(self._text, self._at, partial=not end)
            if match is None:
                continue
            found = _Found(one, opens, match)
            if not end and (match.partial or self._may_change(delimiter, match)):
                certain = min(certain, match.start())
            elif best is None or found.rank < best.rank:
                best = found
        if best is not None and best.match.start() >= certain:
            best = None
        return best, certain

    def _may_change(self, delimiter: Delimiter, match: regex.Match[str]) -> bool:
        """Whether more text could make this match another."""
        if match.end() == len(self._text):
            return match.start() == match.end() or delimiter.grows
        if delimiter.literals:
            return False
        # It may have seen the text's end (`$`): with something behind, the same must be found.
        longer = delimiter.pattern.match(self._text + "\x00", match.start())
        return longer is None or longer.span() != match.span() or longer.groupdict() != match.groupdict()

    def _forget(self) -> None:
        if self._at > _KEPT_CHARS:
            cut = self._at - _CONTEXT_CHARS
            self._text, self._at, self._offset = self._text[cut:], _CONTEXT_CHARS, self._offset + cut
