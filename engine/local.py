"""The engine in this process, as an `EngineClient`: what the engine's thread offers, and the bridge to asyncio.

`EngineCore` is the engine's side of the seam: plain calls from any thread, answers handed to a `Sink` from the engine's
own thread. `LocalClient` is the asyncio side. The gRPC server (`rpc_server`) is the other user of a core. Knows threads
and queues; not what the engine computes, and no wire format.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Protocol

from .errors import EngineError, EngineLost, InvalidRequest
from .request import EngineInfo, EngineStats, Request, StepOutput


@dataclass(frozen=True, slots=True)
class RequestError:
    """The end of a request that failed; nothing follows it."""

    request_id: str
    error: EngineError


Delivery = StepOutput | RequestError
"""One entry of a batch."""


class Sink(Protocol):
    """Where the engine puts what it made for one connection. One sink serves many requests."""

    def deliver(self, batch: list[Delivery]) -> None:
        """Take what one turn made for this sink's requests, in order.

        Called from the engine's thread, once for each launch that is read back. Never blocks, never raises. The list now belongs to the sink.
        Ids it does not know (any more) are dropped.
        """
        ...


class EngineCore(Protocol):
    """What an engine's thread offers to this process. Every method may be called from any thread."""

    @property
    def info(self) -> EngineInfo:
        """What is served; constant but for its adapters."""
        ...

    def load_adapter(self, name: str, folder: str, digest: str = "") -> str:
        """See `EngineClient.load_adapter` -> its digest. Blocks while it is read. With `digest` only this very adapter will do; if it is
        there already nothing is done."""
        ...

    def unload_adapter(self, name: str) -> None:
        """See `EngineClient.unload_adapter`."""
        ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request and return at once; one with a grammar may take a second, so it does not belong on an event
        loop's thread. Its outputs go to `sink`, ending with exactly one last entry: a `StepOutput` with a finish reason
        or a `RequestError`.

        Raises at once, and delivers nothing then: InvalidRequest (also for an id that is in the engine now), Overloaded,
        EngineStopped.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Free the request's lane within two steps; it ends with FinishReason.ABORT. Unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """Counters now."""
        ...

    def healthy(self) -> bool:
        """True if the engine takes work and its loop has moved recently while it had work."""
        ...

    def alive(self) -> bool:
        """False once the engine has failed or hangs: only a new process helps. True while it drains."""
        ...

    def drain(self, timeout_s: float) -> None:
        """Take no new requests, wait for the running ones, end with ABORT what is left after `timeout_s`. Blocks."""
        ...

    def stop(self) -> None:
        """End all requests with ABORT and the thread with them. Blocks; may be called again."""
        ...


class _Mailbox:
    """Outputs of one request that its reader has not taken, and the reader if it waits.

    An `asyncio.Queue` does the same at three times the cost, and this is paid for every token.
    """

    __slots__ = ("items", "reader")

    def __init__(self) -> None:
        self.items: deque[Delivery] = deque()
        self.reader: asyncio.Future[None] | None = None

    def put(self, item: Delivery) -> None:
        self.items.append(item)
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)

    async def wait(self) -> None:
        """Return when something is there."""
        self.reader = asyncio.get_running_loop().create_future()
        await self.reader


class Streams:
    """The running requests of one client, each with the outputs its reader has not taken yet.

    Used from one event loop only. Nothing waits for a slow reader: its outputs pile up here, at most `max_tokens` tokens
    a request, because the engine stops there.
    """

    def __init__(self) -> None:
        self._mailboxes: dict[str, _Mailbox] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._mailboxes

    @property
    def ids(self) -> tuple[str, ...]:
        """Of those that run."""
        return tuple(self._mailboxes)

    def open(self, request_id: str) -> None:
        """Start to keep outputs for this id. Raises InvalidRequest if it is running already."""
        if request_id in self._mailboxes:
            raise InvalidRequest(
                f"request id {request_id!r} is already running; use a fresh id for each request"
            )
        self._mailboxes[request_id] = _Mailbox()

    def close(self, request_id: str) -> None:
        """Forget the id; what comes for it from now on is dropped."""
        self._mailboxes.pop(request_id, None)

    def deliver(self, batch: list[Delivery]) -> None:
        """Hand each entry to its reader."""
        for item in batch:
            mailbox = self._mailboxes.get(item.request_id)
            if mailbox is not None:
                mailbox.put(item)

    def fail(self, message: str) -> list[str]:
        """End all of them with EngineLost, after what was already delivered. Returns their ids."""
        running = list(self.ids)
        self.deliver([RequestError(request_id, EngineLost(message)) for request_id in running])
        return running

    async def read(self, request_id: str) -> AsyncGenerator[StepOutput, None]:
        """Yield the outputs of an open id up to its last, those that wait as one; raise the error it ends with."""
        mailbox = self._mailboxes[request_id]
        items = mailbox.items
        while True:
            if not items:
                await mailbox.wait()
            item = items.popleft()
            if isinstance(item, RequestError):
                raise item.error
            output = _joined(item, items) if items else item
            yield output
            if output.finish_reason is not None:
                return


def _joined(first: StepOutput, behind: deque[Delivery]) -> StepOutput:
    """An output and those behind it, which are taken: whoever reads late catches up at the price of one."""
    outputs = [first]
    while behind and isinstance(following := behind[0], StepOutput):
        outputs.append(following)
        behind.popleft()
    last = outputs[-1]
    tokens = tuple(token for output in outputs for token in output.tokens)
    timing = last.timing or first.timing
    return replace(first, tokens=tokens, finish_reason=last.finish_reason, timing=timing)


class _LoopSink:
    """Carries batches from the engine's thread to the event loop: one wake-up a turn, whatever the batch holds."""

    def __init__(self, streams: Streams, loop: asyncio.AbstractEventLoop) -> None:
        self._streams = streams
        self._loop = loop

    def deliver(self, batch: list[Delivery]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._streams.deliver, batch)
        except RuntimeError:  # the loop is closed: nobody reads any more
            pass


async def _submit(core: EngineCore, request: Request, sink: Sink) -> None:
    """Submit without holding up the event loop. Whoever gives up meanwhile leaves nothing behind."""
    if request.grammar is None:
        core.submit(request, sink)
        return
    submitting = asyncio.ensure_future(asyncio.to_thread(core.submit, request, sink))
    try:
        await asyncio.shield(submitting)
    except asyncio.CancelledError:

        def withdraw(done: asyncio.Future[None]) -> None:
            if not done.cancelled() and done.exception() is None:
                core.cancel(request.id)

        submitting.add_done_callback(withdraw)
        raise


class LocalClient:
    """An `EngineClient` for a core in this process. Does not own the core: closing the client leaves it running."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._streams = Streams()
        self._sink: _LoopSink | None = None
        self._closed = False

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `EngineClient.submit`."""
        if self._closed:
            raise EngineLost("this client is closed; make a new LocalClient")
        if self._sink is None:
            self._sink = _LoopSink(self._streams, asyncio.get_running_loop())
        self._streams.open(request.id)
        running = False  # an id that was refused may be another client's, so it must not be cancelled
        try:
            await _submit(self._core, request, self._sink)
            running = True
            async for output in self._streams.read(request.id):
                running = output.finish_reason is None
                yield output
        except EngineError:
            running = False
            raise
        finally:
            self._streams.close(request.id)
            if running:
                self._core.cancel(request.id)

    async def info(self) -> EngineInfo:
        """See `EngineClient.info`."""
        return self._core.info

    async def load_adapter(self, name: str, folder: str) -> None:
        """See `EngineClient.load_adapter`."""
        await asyncio.to_thread(self._core.load_adapter, name, folder)

    async def unload_adapter(self, name: str) -> None:
        """See `EngineClient.unload_adapter`."""
        self._core.unload_adapter(name)

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        return self._core.stats()

    async def health(self) -> bool:
        """See `EngineClient.health`."""
        return not self._closed and self._core.healthy()

    async def drain(self, timeout_s: float) -> None:
        """See `EngineClient.drain`."""
        await asyncio.to_thread(self._core.drain, timeout_s)

    async def close(self) -> None:
        """See `EngineClient.close`."""
        self._closed = True
        for request_id in self._streams.fail("the client was closed while the request ran"):
            self._core.cancel(request_id)
