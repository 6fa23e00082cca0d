"""One tool call in a model's own syntax, character by character: its name, then its arguments as JSON text.

A scan knows where its call ends and whether it is one; what stands around it is `tool_parser.py`'s. JSON is followed by its
brackets and strings only, so what a model writes as arguments reaches the client as it is, as OpenAI's does.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from .argument_text import plain, sound
from .tool_formats import ARGUMENTS_MARK, ID_MARK

ARGUMENTS = ("arguments", "parameters")
"""What models call them."""
NO_ARGUMENTS = "{}"
MAX_HEAD_CHARS = 400
"""Longest name with all that may stand before its arguments."""
MAX_PYTHON_CHARS = 200_000
"""Longest call in Python's syntax, which is read as a whole."""
SPACES = " \t\r\n"
_PAIRS = {"{": "}", "[": "]", "(": ")"}
_SCALAR = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-.")
_HEAD = re.compile(rf"([^\[{{\s]+)\s*(?:{re.escape(ID_MARK)}\w+)?(?:{re.escape(ARGUMENTS_MARK)})?\s*")


class Scanned(NamedTuple):
    """What one character brought."""

    name: str | None = None
    """Of the tool, when it is certain that this is a call."""
    arguments: str = ""
    done: bool = False
    failed: bool = False
    """It is not a call, or no more of one."""
    unread: str = ""
    """The character, if it is no part of the call."""


NOTHING = Scanned()
DONE = Scanned(done=True)
FAILED = Scanned(failed=True)


class CallScan:
    """Scans one call."""

    def feed(self, char: str) -> Scanned:
        """What this character brings."""
        raise NotImplementedError

    def rest(self) -> str:
        """What the arguments that were told lack, where a model ended its answer within a call. What it writes as JSON itself stays
        as it is."""
        return ""


class ValueScan:
    """Finds the end of a JSON value, or of brackets of any kind that hold one."""

    def __init__(self, quotes: str = '"') -> None:
        self._quotes = quotes
        self._open: list[str] = []
        """The brackets that are expected, the outermost first."""
        self._quote = ""
        self._escaped = False
        self._scalar = False
        self.ended = False
        self.failed = False
        self.unread = False
        """Whether the last character stands behind the value."""

    def feed(self, char: str) -> None:
        """Take one more character; then see `ended` and `failed`."""
        if self._quote:
            self._inside_string(char)
        elif char in self._quotes and not self._scalar:
            self._quote = char
        elif char in _PAIRS and not self._scalar:
            self._open.append(_PAIRS[char])
        elif self._open:
            if char in _PAIRS.values():
                self.failed = self._open.pop() != char
                self.ended = not self._open
        elif char in _SCALAR:
            self._scalar = True
        else:
            self.failed, self.ended, self.unread = not self._scalar, self._scalar, True

    def _inside_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == self._quote:
            self._quote = ""
            self.ended = not self._open


class ObjectScan(CallScan):
    """`{"name": "f", "arguments": {…}}`, with other keys and in another order too."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._step = self._opening
        self._key = ""
        self._read: list[str] = []
        self._value = ValueScan()
        self._name: str | None = None
        self._arguments: str | None = None
        """As JSON, where they came before the name or in another shape than an object."""
        self._told = self._streams = False

    def feed(self, char: str) -> Scanned:
        """What this character brings."""
        return self._step(char)

    def _opening(self, char: str) -> Scanned:
        self._step = self._before_key
        return NOTHING if char == "{" else FAILED

    def _before_key(self, char: str) -> Scanned:
        if char == "}":
            return self._end()
        if char == '"':
            self._begin_value(self._in_key)
            return self._in_key(char)
        return NOTHING if char in SPACES else FAILED

    def _in_key(self, char: str) -> Scanned:
        self._read.append(char)
        self._value.feed(char)
        if self._value.ended:
            self._key = str(_json("".join(self._read)))
            self._step = self._colon
        return NOTHING

    def _colon(self, char: str) -> Scanned:
        if char == ":":
            self._step = self._before_value
            return NOTHING
        return NOTHING if char in SPACES else FAILED

    def _before_value(self, char: str) -> Scanned:
        if char in SPACES:
            return NOTHING
        self._begin_value(self._in_value)
        if self._key in ARGUMENTS and self._name is not None and char == "{" and not self._told:
            self._told = self._streams = True
            self._value.feed(char)
            return Scanned(self._name, char)
        return self._in_value(char)

    def _in_value(self, char: str) -> Scanned:
        self._value.feed(char)
        if self._value.failed:
            return Scanned(failed=True, unread=char)
        if not self._value.unread and not self._streams:
            self._read.append(char)
        piece = char if self._streams else ""
        if self._value.ended:
            self._streams, self._step = False, self._after_value
            if not self._take(piece):
                return FAILED
            if self._value.unread:
                return self._after_value(char)
        return Scanned(arguments=piece) if piece else NOTHING

    def _take(self, streamed: str) -> bool:
        """Whether a value that has ended leaves this a call."""
        if streamed or self._told:
            return True
        value = "".join(self._read)
        if self._key == "name":
            self._name = str(_json(value))
            return self._name in self._names
        if self._key in ARGUMENTS:
            self._arguments = value
        return True

    def _after_value(self, char: str) -> Scanned:
        if char == "}":
            return self._end()
        if char == ",":
            self._step = self._before_key
            return NOTHING
        return NOTHING if char in SPACES else Scanned(failed=True, unread=char)

    def _end(self) -> Scanned:
        if self._told:
            return DONE
        arguments = object_text(self._arguments)
        if self._name is None or arguments is None:
            return FAILED
        return Scanned(self._name, arguments, done=True)

    def _begin_value(self, step: Any) -> None:
        self._read, self._value, self._step = [], ValueScan(), step


class NamedScan(CallScan):
    """`f[ARGS]{…}`."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._head = ""
        self._value: ValueScan | None = None

    def feed(self, char: str) -> Scanned:
        """What this character brings."""
        if self._value is not None:
            return self._arguments(self._value, char)
        if char != "{":
            self._head += char
            return NOTHING if len(self._head) <= MAX_HEAD_CHARS and char not in "}\"'" else FAILED
        head = _HEAD.fullmatch(self._head)
        if head is None or head[1] not in self._names:
            return FAILED
        self._value = ValueScan()
        self._value.feed(char)
        return Scanned(head[1], char)

    def _arguments(self, value: ValueScan, char: str) -> Scanned:
        value.feed(char)
        if value.failed:
            return Scanned(failed=True, unread=char)
        return Scanned(arguments=char, done=value.ended)


class PythonScan(CallScan):
    """`f(a=1, b=[True, None])`, told when it is complete: only then are its arguments JSON."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._name = ""
        self._read: list[str] = []
        self._value = ValueScan("\"'")

    def feed(self, char: str) -> Scanned:
        """What this character brings."""
        if not self._read:
            if char != "(":
                self._name += char
                return NOTHING if len(self._name) <= MAX_HEAD_CHARS and char not in "[]{})\"'\n" else FAILED
            if self._name not in self._names:
                return FAILED
        self._read.append(char)
        self._value.feed(char)
        if self._value.failed or len(self._read) > MAX_PYTHON_CHARS:
            return FAILED
        if not self._value.ended:
            return NOTHING
        arguments = _python_arguments("".join(self._read))
        return FAILED if arguments is None else Scanned(self._name, arguments, done=True)


def _json(text: str) -> Any:
    """A JSON value, or None."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def object_text(raw: str | None) -> str | None:
    """Arguments as the JSON text of an object: given as one, as a text of one, or not at all; None if they are none."""
    if raw is None or raw == "null":
        return NO_ARGUMENTS
    value = _json(raw)
    if isinstance(value, str):
        raw, value = value or NO_ARGUMENTS, _json(value or NO_ARGUMENTS)
    return sound(raw) if isinstance(value, Mapping) else None


def _python_arguments(text: str) -> str | None:
    """`(a=1)` as the JSON text of an object, or None. Nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        found: dict[str, Any] = {}
        for keyword in call.keywords:
            value = plain(keyword.value)
            found |= value if keyword.arg is None else {keyword.arg: value}
        return json.dumps(found, allow_nan=False)
    # Python 3.11 has a SystemError for some trees that are too deep.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, SystemError):
        return None
