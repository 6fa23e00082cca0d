"""The stream of a response: progress in text → named, numbered events in the order that OpenAI's clients insist on.

`response.created`, `response.in_progress`; for each item (thinking, a message, a call) `…output_item.added`, its deltas, what they add up to, and
`…output_item.done`; then `response.completed`, `response.incomplete` or `response.failed`. Knows no HTTP.
"""

from dataclasses import dataclass, field
from typing import Any

from .errors import problem_of
from .generate import Done, Progress, TextToken
from .openai_run import Emitter, Job
from .reasoning import visible
from .responses_shapes import (
    CALL_PREFIX,
    Envelope,
    Kind,
    call_item,
    item,
    item_id,
    logprobs_of,
    new_id,
    part,
    status_of,
)
from .schema_responses import ResponsesBody
from .stream import typed_event
from .tool_parser import CallArguments, CallStart
from .validate_openai import scores_of

_TEXT = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


@dataclass(slots=True)
class _Open:
    """The item that is being written."""

    kind: Kind
    index: int
    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}


@dataclass(slots=True)
class _OpenCall:
    """The call that is being written."""

    index: int
    id: str
    call_id: str
    name: str
    texts: list[str] = field(default_factory=list)

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}

    def item(self, status: str) -> dict[str, Any]:
        """The call as far as it came."""
        return call_item(self.id, status, self.call_id, self.name, "".join(self.texts))


class ResponseEvents(Emitter):
    """Makes the events of one stream."""

    def __init__(self, job: Job, body: ResponsesBody) -> None:
        self._envelope = Envelope(job, body)
        self._reader = job.readers()[0]
        self._reasoning = body.include_reasoning is not False
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open: _Open | _OpenCall | None = None
        self._done: Done | None = None
        self._job = job
        self._scored = scores_of(body)
        self._pending: list[TextToken] = []
        """Tokens whose log-probabilities are not sent yet, because their text is not."""

    def of(self, progress: Progress) -> bytes:
        """The events of one progress."""
        events: list[bytes] = []
        if self._number == 0:
            events += [
                self._event("response.created", response=self._envelope.running()),
                self._event("response.in_progress", response=self._envelope.running()),
            ]
        self._done = progress.done
        if self._scored:
            self._pending += progress.tokens
        reasoning, pieces = self._reader.of(progress)
        if reasoning and self._reasoning:
            events += self._write("reasoning", reasoning)
        for piece in pieces:
            if isinstance(piece, str):
                events += self._write("message", piece)
            else:
                events += self._call(piece)
        return b"".join(events)

    def end(self) -> bytes:
        """The end of the last item and of the response."""
        assert self._done is not None, "all sequences have ended"
        events: list[bytes] = []
        if self._open is None:
            events += self._begin("message")
        status = status_of(self._done)
        events += self._close(status)
        response = self._envelope.finished(self._done, self._output, self._reader.reasoning_tokens)
        events.append(self._event(f"response.{status}", response=response))
        return b"".join(events)

    def failed(self, error: Exception) -> bytes:
        """The response as far as it came, and why no further."""
        problem = problem_of(error)
        code = "rate_limit_exceeded" if problem.row.openai_status == 429 else "server_error"
        events = self._close("incomplete") if self._open else []
        response = self._envelope.failed({"code": code, "message": problem.message}, self._output)
        return b"".join([*events, self._event("response.failed", response=response)])

    def _write(self, kind: Kind, text: str) -> list[bytes]:
        events: list[bytes] = []
        current = self._open
        if not isinstance(current, _Open) or current.kind != kind:
            if current is not None:
                events += self._close("completed")
            events += self._begin(kind)
            current = self._open
        assert isinstance(current, _Open), "a text is open"
        current.texts.append(text)
        told = {"logprobs": self._scores(text)} if kind == "message" else {}
        current.logprobs += told.get("logprobs", ())
        return [*events, self._event(f"{_TEXT[kind]}.delta", **current.place, delta=text, **told)]

    def _scores(self, text: str) -> list[dict[str, Any]]:
        """Log-probabilities of the tokens that make up this text. Those before it, of a call or of thinking, are not told."""
        span = self._reader.span
        ready = visible(self._pending, span)
        said = "".join(token.text for token in ready)
        at = 0 if said.startswith(text) else max(0, said.rfind(text))
        start = (ready[0].start if ready else span[1]) + at
        end = start + len(text)
        self._pending = [token for token in self._pending if token.start >= end]
        return logprobs_of(self._job, visible(ready, (start, end)))

    def _call(self, piece: CallStart | CallArguments) -> list[bytes]:
        events: list[bytes] = []
        if isinstance(piece, CallStart):
            if self._open is not None:
                events += self._close("completed")
            opened = _OpenCall(len(self._output), new_id(CALL_PREFIX), piece.id, piece.name)
            self._open = opened
            added = opened.item("in_progress")
            return [
                *events,
                self._event("response.output_item.added", output_index=opened.index, item=added),
            ]
        current = self._open
        assert isinstance(current, _OpenCall), "arguments follow a start"
        current.texts.append(piece.text)
        kind = "response.function_call_arguments.delta"
        return [self._event(kind, **current.place, delta=piece.text)]

    def _begin(self, kind: Kind) -> list[bytes]:
        self._open = opened = _Open(kind, len(self._output), item_id(kind))
        added = item(kind, opened.id, "in_progress", [])
        events = [self._event("response.output_item.added", output_index=opened.index, item=added)]
        if kind == "message":
            events.append(self._event("response.content_part.added", **opened.place, part=part(kind, "", [])))
        return events

    def _close(self, status: str) -> list[bytes]:
        """The item's text as a whole, and the item."""
        closing, self._open = self._open, None
        assert closing is not None, "an item is open"
        if isinstance(closing, _OpenCall):
            return self._close_call(closing, status)
        kind, place, text = closing.kind, closing.place, "".join(closing.texts)
        whole = part(kind, text, closing.logprobs)
        told = {"logprobs": closing.logprobs} if kind == "message" else {}
        events = [self._event(f"{_TEXT[kind]}.done", **place, text=text, **told)]
        if kind == "message":
            events.append(self._event("response.content_part.done", **place, part=whole))
        done = item(kind, closing.id, status, [whole])
        self._output.append(done)
        return [*events, self._event("response.output_item.done", output_index=closing.index, item=done)]

    def _close_call(self, closing: _OpenCall, status: str) -> list[bytes]:
        done = closing.item(status)
        self._output.append(done)
        told = {"name": closing.name, "arguments": done["arguments"]}
        return [
            self._event("response.function_call_arguments.done", **closing.place, **told),
            self._event("response.output_item.done", output_index=closing.index, item=done),
        ]

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return typed_event({"type": kind, "sequence_number": number, **fields})
