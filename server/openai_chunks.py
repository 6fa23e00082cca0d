"""OpenAI's stream: progress in text → chunks, for chat and completions alike. One small JSON value is encoded per chunk;
all that stays the same in a stream is encoded once. Knows shapes and bytes; no HTTP.

Order per choice: texts, then one chunk with `finish_reason` alone; after the last choice the usage, then `[DONE]`.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from .backend import Serving
from .generate import Progress, TextToken
from .openai_shapes import fingerprint, visible
from .stream import event

ID = ""
"""TGI's ids are empty, and its clients have seen nothing else."""
_TEXT = "\x00"
_LOGPROBS = "\x01"

Logprobs = Callable[[Iterable[TextToken]], dict[str, Any]]


@dataclass(slots=True)
class _Choice:
    head: bytes
    middle: bytes
    tail: bytes
    shown: int = 0
    """Characters sent."""
    pending: list[TextToken] = field(default_factory=list)
    """Tokens whose log-probabilities are not sent yet, because their text is not."""


class Chunks:
    """Makes the chunks of one stream."""

    def __init__(
        self, serving: Serving, model: str, *, chat: bool, choices: int, logprobs: Logprobs | None
    ) -> None:
        self._chat = chat
        self._logprobs = logprobs
        self._frame = {
            "id": ID,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint(serving),
        }
        self._choices = [self._prepared(index) for index in range(choices)]

    def of(self, progress: Progress) -> bytes:
        """The chunks of one progress; none while its text is held back."""
        choice = self._choices[progress.choice]
        if self._logprobs is not None:
            choice.pending += progress.tokens
        chunks: list[bytes] = []
        # A choice without any text still says so once, in the place where clients look for it.
        if progress.text or (progress.done is not None and not choice.shown):
            choice.shown += len(progress.text)
            chunks += [
                choice.head,
                orjson.dumps(progress.text),
                choice.middle,
                self._scores(choice),
                choice.tail,
            ]
        if progress.done is not None:
            chunks.append(self._last(progress.choice, progress.done.ending.openai))
        return b"".join(chunks)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk after all choices."""
        return event({**self._frame, "choices": [], "usage": usage})

    def _scores(self, choice: _Choice) -> bytes:
        if self._logprobs is None:
            return b"null"
        ready = visible(choice.pending, choice.shown)
        choice.pending = [token for token in choice.pending if token.start >= choice.shown]
        return orjson.dumps(self._logprobs(ready))

    def _last(self, index: int, reason: str) -> bytes:
        # TGI's own client needs the role and the (absent) calls in every delta.
        text = {"delta": {"role": "assistant", "tool_calls": None}} if self._chat else {"text": ""}
        choice = {"index": index, **text, "logprobs": None, "finish_reason": reason}
        return event({**self._frame, "choices": [choice], "usage": None})

    def _prepared(self, index: int) -> _Choice:
        """A chunk's JSON with the two values that change cut out of it."""
        text: dict[str, Any] = {"text": _TEXT}
        if self._chat:
            text = {"delta": {"role": "assistant", "content": _TEXT, "tool_calls": None}}
        choice = {"index": index, **text, "logprobs": _LOGPROBS, "finish_reason": None}
        whole = event({**self._frame, "choices": [choice], "usage": None})
        head, rest = whole.split(orjson.dumps(_TEXT))
        middle, tail = rest.split(orjson.dumps(_LOGPROBS))
        return _Choice(head, middle, tail)
