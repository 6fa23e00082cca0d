"""One tool call written in tags, character by character: its name, then its arguments, made JSON on the way.

`f>` `<parameter=a>1</parameter>` `</function>` or `f` `<arg_key>a</arg_key><arg_value>1</arg_value>` `</tool_call>`: which tags is
the format's to say. A value that can only be a text is passed on as it comes, any other when it is complete, because only then
is it known what it is. Knows tags and schemas; what stands around a call is `tool_parser.py`'s.
"""

from collections.abc import Mapping
from typing import Any

from .argument_text import KINDS, TEXT, argument_json, as_json, kinds_of
from .call_scan import FAILED, MAX_HEAD_CHARS, NO_ARGUMENTS, NOTHING, SPACES, CallScan, Scanned
from .tool_formats import Tags

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:/-")


class TagScan(CallScan):
    """Scans one call."""

    def __init__(self, tags: Tags, tools: Mapping[str, Mapping[str, Any]], close: str) -> None:
        """`tools`: the schema of the arguments of each tool that may be called. `close`: the format's closing mark, which ends a call
        whose own end was forgotten."""
        self._tags = tags
        self._ends = (tags.end, close)
        self._tools = tools
        self._step = self._in_name
        self._name = ""
        self._held = ""
        """What may be the beginning of a tag."""
        self._arguments = 0
        """How many were told."""
        self._kinds = KINDS
        """Types of the value that is being read."""
        self._first = True
        """Whether nothing of it has come."""
        self._read: list[str] = []
        closing = tags.value_close
        self._closings = (closing, f"\n{closing}") if tags.lines else (closing,)

    def feed(self, char: str) -> Scanned:
        """What this character brings."""
        return self._step(char)

    def rest(self) -> str:
        """What the arguments that were told lack to be JSON: the end of the value that is being read, and their own."""
        if not self._arguments:
            return ""
        within = self._step in (self._before_value, self._in_value)
        return f"{self._value_end() if within else ''}}}"

    def _in_name(self, char: str) -> Scanned:
        if char in _NAME and len(self._name) < MAX_HEAD_CHARS:
            self._name += char
            return NOTHING
        ended = char == self._tags.name_close if self._tags.name_close else char in SPACES or char == "<"
        if not ended or self._name not in self._tools:
            return FAILED
        self._step = self._between
        return self._between(char) if char == "<" else NOTHING

    def _between(self, char: str) -> Scanned:
        """Where an argument or the end of the call may come."""
        if char in SPACES and not self._held:
            return NOTHING
        self._held += char
        if self._held == self._tags.key_open:
            self._held, self._step = "", self._in_key
        elif self._held in self._ends:
            # The format's closing mark, be it the end or not, is for the parser to see.
            unread = "" if self._tags.own_end and self._held == self._tags.end else self._held
            name = None if self._arguments else self._name
            return Scanned(name, "}" if self._arguments else NO_ARGUMENTS, done=True, unread=unread)
        elif not any(mark.startswith(self._held) for mark in (self._tags.key_open, *self._ends)):
            return self._broken_off()
        return NOTHING

    def _in_key(self, char: str) -> Scanned:
        self._held += char
        if len(self._held) > MAX_HEAD_CHARS:
            return self._broken_off()
        if not self._held.endswith(self._tags.key_close):
            return NOTHING
        key, self._held = self._held.removesuffix(self._tags.key_close).strip(), ""
        schema = self._tools[self._name]
        properties = schema.get("properties")
        self._kinds = kinds_of(properties.get(key), schema) if isinstance(properties, Mapping) else KINDS
        self._first, self._read = True, []
        self._step = self._before_value if self._tags.value_open else self._in_value
        self._arguments += 1
        opening = '"' if self._kinds == TEXT else ""
        if self._arguments == 1:
            return Scanned(self._name, f"{{{as_json(key)}: {opening}")
        return Scanned(arguments=f", {as_json(key)}: {opening}")

    def _before_value(self, char: str) -> Scanned:
        if char in SPACES and not self._held:
            return NOTHING
        self._held += char
        if self._held == self._tags.value_open:
            self._held, self._step = "", self._in_value
        elif not self._tags.value_open.startswith(self._held):
            return self._broken_off()
        return NOTHING

    def _in_value(self, char: str) -> Scanned:
        first, self._first = self._first, False
        if first and self._tags.lines and char == "\n":
            return NOTHING
        self._held += char
        if self._held in self._closings:
            self._held, self._step = "", self._between
            return Scanned(arguments=self._value_end())
        said = 0
        while not any(closing.startswith(self._held[said:]) for closing in self._closings):
            said += 1
        text, self._held = self._held[:said], self._held[said:]
        if self._kinds == TEXT:
            return Scanned(arguments=as_json(text)[1:-1]) if text else NOTHING
        self._read.append(text)
        return NOTHING

    def _value_end(self) -> str:
        """What is not told yet of the JSON of a value that ends here."""
        return '"' if self._kinds == TEXT else argument_json("".join(self._read), self._kinds)

    def _broken_off(self) -> Scanned:
        """What has come is a call all the same, if it was told; what comes is none of it."""
        return Scanned(arguments=self.rest(), failed=True, unread=self._held)
