"""A model's answer, as it comes → text and tool calls. Knows the formats of `tool_formats.py`; no JSON of any API.

A call is told as soon as its name is certain, its arguments as they come. Until then all of it is kept, and what turns out to
be no call (another name, another shape, an end too early) is text like any other: nothing is lost. Every character is looked
at once, and how the answer is cut into pieces does not matter.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from .call_scan import CallScan, NamedScan, ObjectScan, PythonScan, Scanned
from .tag_scan import TagScan
from .tool_formats import ToolFormat

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_SEPARATORS = " \t\r\n,;[]"
"""What may stand around the calls of a list, by itself or between marks."""
_MOST_SPACES = 64
"""Most spaces held back for what may follow them; a mark behind them takes so many away."""


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    index: int
    """How many calls were before it."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the arguments' JSON."""

    index: int
    text: str


Piece = str | CallStart | CallArguments
"""Of an answer, in order. A text is one that is no call."""


class _State(Enum):
    START = auto()
    """Nothing but spaces so far: a call may come without a mark."""
    TEXT = auto()
    CALLS = auto()
    """Behind a mark or a call: the next call, another mark, or the end of calls."""
    CALL = auto()
    """Inside a call."""


class ToolParser:
    """Parses one answer."""

    def __init__(self, form: ToolFormat, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """`tools`: the schema of the arguments of each tool that may be called."""
        self._form = form
        self._tools = tools
        self._names = frozenset(tools)
        self._state = _State.START if form.bare else _State.TEXT
        self._held = ""
        """Spaces, and what may be the beginning of a mark."""
        self._raw: list[str] = []
        """All since the last thing that is certain, in case it is text after all."""
        self._scan: CallScan | None = None
        self._told = False
        """Whether the call that is being read was told."""
        self._after_call = False
        """Whether spaces that come now would stand behind a call."""
        self.calls = 0
        """Calls told so far."""

    def push(self, text: str, *, end: bool = False, cut: bool = True) -> list[Piece]:
        """What became certain with this text. `end`: nothing follows. `cut`: then because the model was cut off, not by its will."""
        found: list[Piece] = []
        self._read(text, found)
        if end:
            self._end(found, cut=cut)
        return list(joined(found))

    def _read(self, text: str, found: list[Piece]) -> None:
        at = 0
        while at < len(text):
            if self._state is _State.TEXT:
                at = self._text(text, at, found)
            else:
                self._character(text[at], found)
                at += 1

    def _text(self, text: str, at: int, found: list[Piece]) -> int:
        """Go on to the next mark; where to go on from."""
        seen = self._held + text[at:]
        starts = [(start, mark) for mark in self._form.marks if (start := seen.find(mark)) >= 0]
        if starts:
            start, mark = min(starts)
            said = seen[: _without_spaces(seen, start)]
            self._say(said, found)
            self._raw = [seen[len(said) : start + len(mark)]]
            self._held, self._state = "", _State.CALLS
            return len(text) - (len(seen) - start - len(mark))
        keep = max((_partial(seen, mark) for mark in self._form.marks), default=0)
        certain = seen[: _without_spaces(seen, len(seen) - keep)]
        self._say(certain, found)
        self._held = seen[len(certain) :]
        return len(text)

    def _character(self, char: str, found: list[Piece]) -> None:
        if self._state is _State.CALL:
            self._inside(char, found)
        elif self._state is _State.START:
            self._begin(char, found)
        else:
            self._between(char, found)

    def _begin(self, char: str, found: list[Piece]) -> None:
        """The first characters of an answer that may be a call by itself."""
        if char.isspace() and len(self._held) < _MOST_SPACES:
            self._held += char
        elif char == self._form.bare:
            self._raw, self._held = [self._held], ""
            self._state = _State.CALLS
            self._between(char, found)
        else:
            self._state = _State.TEXT
            self._text(char, 0, found)

    def _between(self, char: str, found: list[Piece]) -> None:
        """One character where a call, a mark or the end of calls may come."""
        self._raw.append(char)
        marks = (*self._form.marks, *filter(None, (self._form.close,)))
        held = self._held + char
        if held in marks:
            self._held = ""
            if held == self._form.close:
                self._close(found)
        elif any(mark.startswith(held) for mark in marks):
            self._held = held
        else:
            # What looked like a mark is none; brackets may be those of a list.
            listed, self._held = all(c in _SEPARATORS for c in self._held), ""
            if not listed:
                self._not_a_call(found)
            elif any(mark.startswith(char) for mark in marks):
                self._held = char
            elif char not in _SEPARATORS:
                self._call(char, found)

    def _call(self, char: str, found: list[Piece]) -> None:
        """The first character of a call, or of something else."""
        scan = self._new_scan(char)
        if scan is None:
            self._not_a_call(found)
            return
        self._scan, self._told, self._state = scan, False, _State.CALL
        self._take(scan.feed(char), found)

    def _inside(self, char: str, found: list[Piece]) -> None:
        assert self._scan is not None, "a call is being read"
        if not self._told:
            self._raw.append(char)
        self._take(self._scan.feed(char), found)

    def _new_scan(self, char: str) -> CallScan | None:
        """The scan of a call that begins with this character, if one can."""
        match self._form.syntax:
            case "json":
                return ObjectScan(self._names) if char == "{" else None
            case "named":
                # Older models of the family write objects.
                return ObjectScan(self._names) if char == "{" else NamedScan(self._names)
            case "python":
                return PythonScan(self._names)
            case "tags":
                assert self._form.tags is not None, "the format has tags"
                if char == "{":
                    return ObjectScan(self._names)
                return TagScan(self._form.tags, self._tools, self._form.close)
            case "other":
                return None

    def _take(self, scanned: Scanned, found: list[Piece]) -> None:
        """What the scan made of its last character."""
        if scanned.name is not None:
            found.append(CallStart(self.calls, call_id(short=self._form.short_ids), scanned.name))
            self.calls += 1
            self._told, self._after_call, self._raw = True, True, []
        if scanned.arguments:
            found.append(CallArguments(self.calls - 1, scanned.arguments))
        if scanned.failed and not self._told:
            self._not_a_call(found)
        elif scanned.done or scanned.failed:
            self._scan, self._state, self._raw = None, _State.CALLS, []
            self._read(scanned.unread, found)

    def _close(self, found: list[Piece]) -> None:
        """A closing mark: behind a call the end of it, behind none a text."""
        if self._raw and not self._after_call:
            self._not_a_call(found)
            return
        self._state, self._raw = _State.TEXT, []

    def _not_a_call(self, found: list[Piece]) -> None:
        text = "".join(self._raw)
        self._scan, self._raw, self._held, self._state = None, [], "", _State.TEXT
        self._say(text, found)

    def _say(self, text: str, found: list[Piece]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            found.append(text)

    def _end(self, found: list[Piece], *, cut: bool) -> None:
        if self._state in (_State.TEXT, _State.START):
            self._say(self._held, found)
        elif not (self._told if self._state is _State.CALL else self._after_call):
            self._not_a_call(found)
        elif self._scan is not None and not cut and (rest := self._scan.rest()):
            found.append(CallArguments(self.calls - 1, rest))
        self._held = ""


def call_id(*, short: bool = False) -> str:
    """The id of a new call; a short one is nine letters and digits."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9)) if short else f"call_{os.urandom(12).hex()}"


def joined(found: list[Piece]) -> Iterator[Piece]:
    """The pieces, with neighbours of one kind made one."""
    before: Piece | None = None
    for piece in found:
        if isinstance(piece, str) and isinstance(before, str):
            before += piece
        elif isinstance(piece, CallArguments) and isinstance(before, CallArguments):
            before = CallArguments(before.index, before.text + piece.text)
        else:
            if before is not None:
                yield before
            before = piece
    if before is not None:
        yield before


def _without_spaces(text: str, end: int) -> int:
    """Where the spaces begin that the text has before `end`, as many as are held back."""
    spaces = text[max(0, end - _MOST_SPACES) : end]
    return end - len(spaces) + len(spaces.rstrip())


def _partial(text: str, mark: str) -> int:
    """How much of the mark the text ends with."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
