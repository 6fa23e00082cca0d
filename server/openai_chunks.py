"""OpenAI's stream: progress in text → chunks, for chat and completions alike. One small JSON value is encoded per chunk;
all that stays the same in a stream is encoded once. Knows shapes and bytes; no HTTP.

Order per choice: thinking, texts and calls of tools, then one chunk with `finish_reason` alone; after the last choice the usage, then
`[DONE]`.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from .errors import problem_of
from .generate import Progress, TextToken
from .openai_run import Emitter, Job
from .openai_shapes import fingerprint, usage
from .prompt_scores import moved, prompt_tokens
from .reader import Reader, openai_finish
from .reasoning import visible
from .schema_openai import StreamOptions
from .stream import DONE, event
from .tool_parser import CallArguments, CallStart

ID = ""
"""TGI's ids are empty, and its clients have seen nothing else."""
_TEXT = "\x00"
_LOGPROBS = "\x01"
_CLOSE = b"}\n\n"
"""What comes after the usage."""

Logprobs = Callable[[Iterable[TextToken]], dict[str, Any]]


@dataclass(slots=True)
class _Choice:
    reader: Reader
    thinking: list[bytes]
    head: bytes
    middle: bytes
    tail: bytes
    opening: bytes = b""
    """A chunk with the role alone, until it is sent; empty if every chunk tells it."""
    said: bool = False
    """Whether a text or a call was sent."""
    pending: list[TextToken] = field(default_factory=list)
    """Tokens whose log-probabilities are not sent yet, because their text is not."""
    echo: str | None = None
    """The prompt, until it is sent."""
    behind: int = 0
    """Characters of the prompt that its text begins with."""


class Chunks(Emitter):
    """Makes the chunks of one stream."""

    def __init__(
        self,
        job: Job,
        *,
        chat: bool,
        logprobs: Logprobs | None,
        stream_options: StreamOptions | None,
        reasoning: bool = False,
        role_once: bool = False,
    ) -> None:
        """`reasoning`: whether to tell it. `role_once`: whether a chat's role is told at first only."""
        self._job = job
        self._chat = chat
        self._logprobs = logprobs
        self._usage = bool(stream_options and stream_options.include_usage)
        self._usages = bool(stream_options and stream_options.continuous_usage_stats)
        self._reasoning = reasoning
        self._role = {} if role_once else {"role": "assistant"}
        self._frame = {
            "id": ID,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": job.model,
            "system_fingerprint": fingerprint(job.serving),
        }
        self._choices = [self._prepared(index, reader) for index, reader in enumerate(job.readers())]
        self._tokens = 0
        self._cached: dict[int, int] = {}
        """Prompt -> its tokens that were found in the cache by the first of its sequences, which fills it for the others."""

    def of(self, progress: Progress) -> bytes:
        """The chunks of one progress; none while its text is held back."""
        choice = self._choices[progress.choice]
        self._tokens += len(progress.tokens)
        if progress.cached_tokens and progress.choice % self._job.checked.choices == 0:
            self._cached[progress.choice] = progress.cached_tokens
        if self._logprobs is not None:
            choice.pending += progress.tokens
        reasoning, pieces = choice.reader.of(progress)
        chunks: list[bytes] = []
        if choice.echo is not None:
            chunks += self._texts(choice, choice.echo, self._echoed(progress))
            choice.said, choice.echo = True, None
        if reasoning and self._reasoning:
            chunks += [orjson.dumps(reasoning).join(choice.thinking), self._so_far(), _CLOSE]
        # A choice without any text still says so once, in the place where clients look for it.
        for piece in pieces or ([""] if progress.done is not None and not choice.said else []):
            choice.said = True
            if isinstance(piece, str):
                chunks += self._texts(choice, piece, self._scores(choice))
            else:
                chunks.append(self._call(choice, progress.choice, piece))
        if progress.done is not None:
            reason = openai_finish(progress.done, choice.reader.calls, legacy=self._job.legacy)
            chunks.append(self._last(progress.choice, choice, reason))
        if chunks and choice.opening:
            chunks = [choice.opening, self._so_far(), _CLOSE, *chunks]
            choice.opening = b""
        return b"".join(chunks)

    def end(self) -> bytes:
        """The usage, if it is wanted, after all choices."""
        if not self._usage:
            return DONE
        return event({**self._frame, "choices": [], "usage": self._used()}) + DONE

    def failed(self, error: Exception) -> bytes:
        """The error, in the place of a chunk."""
        return failure(error)

    def _texts(self, choice: _Choice, text: str, scores: bytes) -> Iterable[bytes]:
        """A chunk with a text, in pieces."""
        return (
            choice.head, orjson.dumps(text), choice.middle, scores, choice.tail, self._so_far(), _CLOSE
        )  # fmt: skip

    def _call(self, choice: _Choice, index: int, piece: CallStart | CallArguments) -> bytes:
        """A chunk with a call: its id and name first, then the pieces of its arguments."""
        if isinstance(piece, CallStart):
            function = {"name": piece.name, "arguments": ""}
            call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
        else:
            call = {"index": piece.index, "function": {"arguments": piece.text}}
        said = {"function_call": call["function"]} if self._job.legacy else {"tool_calls": [call]}
        delta = {"delta": {**self._role, **said}}
        head, tail = self._chunk(index, delta, _LOGPROBS).split(orjson.dumps(_LOGPROBS))
        return b"".join([head, self._scores(choice), tail, self._so_far(), _CLOSE])

    def _used(self) -> dict[str, Any]:
        reasoning = sum(choice.reader.reasoning_tokens for choice in self._choices)
        return usage(self._job, self._tokens, sum(self._cached.values()), reasoning)

    def _so_far(self) -> bytes:
        return orjson.dumps(self._used()) if self._usages else b"null"

    def _echoed(self, progress: Progress) -> bytes:
        """The log-probabilities of the prompt that a sequence's text begins with."""
        if self._logprobs is None:
            return b"null"
        tokenizer, ids = self._job.serving.tokenizer, self._job.prompt_of(progress.choice).ids
        return orjson.dumps(self._logprobs(prompt_tokens(tokenizer, ids, progress.prompt)))

    def _scores(self, choice: _Choice) -> bytes:
        if self._logprobs is None:
            return b"null"
        span = choice.reader.span
        ready = (
            visible(choice.pending, span) if self._chat else [t for t in choice.pending if t.start < span[1]]
        )
        choice.pending = [token for token in choice.pending if token.start >= span[1]]
        return orjson.dumps(self._logprobs(moved(ready, choice.behind)))

    def _last(self, index: int, ended: _Choice, reason: str) -> bytes:
        # TGI's own client needs the role and the (absent) calls in every delta.
        text = {"delta": {**self._role, "tool_calls": None}} if self._chat else {"text": ""}
        logprobs = None
        if self._logprobs is not None and ended.pending and not self._chat:
            # What ended a completion has no text; it counts as a token, so it is scored like one.
            logprobs = self._logprobs(moved(ended.pending, ended.behind))
        choice = {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}
        return event({**self._frame, "choices": [choice], "usage": self._used() if self._usages else None})

    def _prepared(self, index: int, reader: Reader) -> _Choice:
        """A chunk's JSON with the values that change cut out of it; the usage, which comes last, at the end."""
        text: dict[str, Any] = {"text": _TEXT}
        if self._chat:
            text = {"delta": {**self._role, "content": _TEXT, "tool_calls": None}}
        head, rest = self._chunk(index, text, _LOGPROBS).split(orjson.dumps(_TEXT))
        middle, tail = rest.split(orjson.dumps(_LOGPROBS))
        # Clients look for it under one name or the other.
        thought = {"reasoning": _TEXT, "reasoning_content": _TEXT}
        delta = {"delta": {**self._role, **thought, "tool_calls": None}}
        thinking = self._chunk(index, delta, None).split(orjson.dumps(_TEXT))
        opening = b"" if self._role else self._chunk(index, {"delta": {"role": "assistant"}}, None)
        echo = self._job.prompt_of(index).echo
        return _Choice(reader, thinking, head, middle, tail, opening, echo=echo, behind=len(echo or ""))

    def _chunk(self, index: int, text: dict[str, Any], logprobs: str | None) -> bytes:
        choice = {"index": index, **text, "logprobs": logprobs, "finish_reason": None}
        return event({**self._frame, "choices": [choice], "usage": None}).removesuffix(b"null" + _CLOSE)


def failure(error: Exception) -> bytes:
    """What a stream that breaks off ends with."""
    return event(problem_of(error).openai()) + DONE
