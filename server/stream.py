"""Server-sent events: chunks of bytes → an HTTP response that waits with its status line, keeps proxies awake and ends
with its client. Knows bytes and ASGI; not what an event says.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..engine import EngineError
from .errors import ServerError
from .middleware import log_failure

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
TELL_S = 1.0
"""Seconds between two words on what a stream waits for."""


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


def event(data: Any) -> bytes:
    """One event carrying a JSON value. Numbers that JSON lacks become null."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def typed_event(data: dict[str, Any]) -> bytes:
    """One event that is named after its value's `type`."""
    return b"event: " + data["type"].encode() + b"\n" + event(data)


class EventStream(Response):
    """Sends what a generator yields, from the first chunk on.

    Until then the status is open: an error raised so far goes up, to become a real 4xx or 5xx. If the first chunk is
    long in coming, the stream starts with a comment, and later errors become the last event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        extra_headers: MutableMapping[str, str],
        error_event: Callable[[Exception], bytes],
        keep_alive_s: float,
        keep_alive: Callable[[], bytes] = lambda: KEEP_ALIVE,
        waits: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        """`waits`: what the first chunk waits for, as a comment; none once it is a matter of course."""
        self._chunks = chunks
        self._extra = extra_headers
        self._error_event = error_event
        self._keep_alive_s = keep_alive_s
        self._keep_alive, self._waits = keep_alive, waits
        self._writing = False
        self._started = False
        self._quiet = True
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the generator raised before its first chunk."""
        pump = asyncio.create_task(self._pump(scope, send))
        watch = asyncio.create_task(self._watch(receive, send))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, watch):
                task.cancel()
            results = await asyncio.gather(pump, watch, return_exceptions=True)
        for error in results:
            if isinstance(error, Exception):
                raise error

    async def _pump(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            try:
                async for chunk in chunks:
                    await self._send(send, chunk)
            except Exception as error:
                if not self._started:
                    raise
                if not isinstance(error, ServerError | EngineError):
                    log_failure(scope, error)
                await self._send(send, self._error_event(error))
        await self._send(send, b"", more=False)

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Returns when the client is gone. Breaks each long silence."""
        while True:
            waited = self._waits() is not None
            try:
                async with asyncio.timeout(TELL_S if waited else self._keep_alive_s):
                    await until_gone(receive)
                return
            except TimeoutError:
                pass
            word = self._waits() if waited else self._keep_alive()
            if word is not None and self._quiet and not self._writing:
                await self._send(send, word)
            self._quiet = True

    async def _send(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        self._quiet, self._writing = False, True
        if not self._started:
            self._started = True
            self.headers.update(self._extra)
            # A stream has no length, and Response has already noted one of 0.
            del self.headers["content-length"]
            start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._writing = False


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(until_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    return task.result()
