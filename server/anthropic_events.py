"""The stream of a message: progress in text → named events in the order that Anthropic's clients insist on.

`message_start`; for each block `content_block_start`, its deltas and `content_block_stop`; then `message_delta` with the
reason and the usage, and `message_stop`. Silences are broken by `ping`, but nothing may come before `message_start`.
Knows no HTTP.
"""

from typing import Any, Literal

from .anthropic_input import shows_thinking
from .anthropic_shapes import Kind, block, call_block, ending_of, message, usage_of
from .errors import problem_of
from .generate import Done, Progress
from .openai_run import Emitter, Job
from .schema_anthropic import MessagesBody
from .stream import typed_event
from .tool_parser import CallArguments, CallStart

PING = typed_event({"type": "ping"})


class MessageEvents(Emitter):
    """Makes the events of one stream."""

    def __init__(self, job: Job, body: MessagesBody) -> None:
        self._job = job
        self._body = body
        self._reader = job.readers()[0]
        self._thinking = shows_thinking(body)
        self._started = False
        self._open: Kind | Literal["tool_use"] | None = None
        self._index = -1
        self._done: Done | None = None

    def of(self, progress: Progress) -> bytes:
        """The events of one progress."""
        events = [self._start(progress.cached_tokens)]
        self._done = progress.done
        reasoning, pieces = self._reader.of(progress)
        if reasoning and self._thinking:
            events += self._write("thinking", reasoning)
        for piece in pieces:
            match piece:
                case str():
                    events += self._write("text", piece)
                case CallStart():
                    events += [*self._close(), *self._begin("tool_use", call_block(piece.id, piece.name, {}))]
                case CallArguments():
                    events.append(self._delta({"type": "input_json_delta", "partial_json": piece.text}))
        return b"".join(events)

    def end(self) -> bytes:
        """The end of the last block and of the message."""
        assert self._done is not None, "all sequences have ended"
        done = self._done
        usage = usage_of(self._job, done.cached_tokens, done.tokens, self._reader.reasoning_tokens)
        events = [] if self._index >= 0 else self._begin("text", block("text", ""))
        events += self._close()
        delta = ending_of(self._job, self._body, done, self._reader.calls)
        events.append(typed_event({"type": "message_delta", "delta": delta, "usage": usage}))
        events.append(typed_event({"type": "message_stop"}))
        return b"".join(events)

    def failed(self, error: Exception) -> bytes:
        """The error, in the place of an event."""
        return failure(error)

    def keep_alive(self) -> bytes:
        """A ping, behind the start of the message."""
        return self._start(0) + PING

    def _start(self, cached_tokens: int) -> bytes:
        if self._started:
            return b""
        self._started = True
        start = message(self._job, [], usage_of(self._job, cached_tokens))
        return typed_event({"type": "message_start", "message": start})

    def _write(self, kind: Kind, text: str) -> list[bytes]:
        events = [] if self._open == kind else [*self._close(), *self._begin(kind, block(kind, ""))]
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _begin(self, kind: Kind | Literal["tool_use"], empty: dict[str, Any]) -> list[bytes]:
        self._open = kind
        self._index += 1
        start = {"type": "content_block_start", "index": self._index, "content_block": empty}
        return [typed_event(start)]

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        signature = [self._delta({"type": "signature_delta", "signature": ""})]
        events = signature if self._open == "thinking" else []
        self._open = None
        return [*events, typed_event({"type": "content_block_stop", "index": self._index})]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return typed_event({"type": "content_block_delta", "index": self._index, "delta": delta})


def failure(error: Exception) -> bytes:
    """What a stream that breaks off ends with."""
    return typed_event(problem_of(error).anthropic())
