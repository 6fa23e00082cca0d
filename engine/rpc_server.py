"""Serves an engine over gRPC on a Unix socket or a TCP port. Knows connections; not what the engine computes.

A call of `Generate` is a connection: it owns the requests that came in through it, and its end cancels them. The
engine's thread hands each connection one batch a turn; the connection writes it as one message, or joins several into
one if the reader is behind. Health is `grpc.health.v1`. There is no encryption and no password: a Unix socket is guarded
by its file modes, a TCP port must be on a network where everyone may use the engine.
"""

import asyncio
import faulthandler
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .errors import EngineError, RequestFailed
from .local import Delivery, EngineCore, RequestError
from .proto import codec, xlane_pb2_grpc
from .proto import xlane_pb2 as pb
from .request import StepOutput

logger = logging.getLogger(__name__)

SERVICE = "xlane.engine.v1.Engine"
"""The name under which health is reported, beside the empty name for the whole server."""

MAX_MESSAGE_BYTES = 16 << 20
"""Bound of one message either way: a prompt of four million tokens, or a full batch with every alternative."""
MAX_BATCH_ENTRIES = 4096
"""Most entries joined into one message, which keeps a batch far below MAX_MESSAGE_BYTES."""
PACE_S = 0.002
"""Least time from one message of a connection to the next: what an engine makes in less goes together. A message costs the
front about 0.1 ms, whatever it carries; a step of a model worth serving takes longer than this."""
MAX_UNREAD_ENTRIES = 1 << 20
"""A connection that leaves more than this unread is broken and cut off."""
HEALTH_PERIOD_S = 1.0
"""How soon those who watch the health are told of a change."""
LOOK_S = 1.0
"""How often the core is looked at while it serves."""
ENGINE_DEAD = 4
"""Exit code of a process whose engine failed or hangs."""
MAX_SOCKET_PATH = 107
"""Most bytes of a Unix socket's path (Linux's `sun_path`)."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A host that vanishes sends no FIN. Both ends ask after 10 s of silence and give up 5 s later.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
"""For both ends."""


class _Connection:
    """One call of `Generate`: the requests it owns and the outputs it has not written yet. A `Sink`."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._loop = asyncio.get_running_loop()
        self._running: set[str] = set()
        self._submitting: dict[str, bool] = {}
        """Requests whose grammar is compiled on another thread, by id, and whether they were cancelled meanwhile."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._unread: list[Delivery] = []
        self._news = asyncio.Event()
        self._ended = False

    def deliver(self, batch: list[Delivery]) -> None:
        """Called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, batch)
        except RuntimeError:  # the loop is closed: the server is gone
            pass

    def _take(self, batch: list[Delivery]) -> None:
        if self._ended:
            return
        for item in batch:
            if isinstance(item, RequestError) or item.finish_reason is not None:
                self._running.discard(item.request_id)
                self._submitting.pop(item.request_id, None)
        self._unread += batch
        if len(self._unread) > MAX_UNREAD_ENTRIES:
            logger.error("a connection leaves %d outputs unread and is cut off", len(self._unread))
            self._unread.clear()
            self.cancel_all()
            self.end()
        self._news.set()

    def end(self) -> None:
        """Write what is left and take no more."""
        self._ended = True
        self._news.set()

    def cancel_all(self) -> None:
        """Free the lanes of all its requests."""
        for request_id in [*self._running, *self._submitting]:
            self._cancel(request_id)
        self._running.clear()

    def _cancel(self, request_id: str) -> None:
        if request_id in self._running:  # never another connection's
            self._core.cancel(request_id)
        elif request_id in self._submitting:
            self._submitting[request_id] = True

    async def listen(self, messages: AsyncIterator[pb.ClientMessage]) -> None:
        """Do what the client asks until it has no more to ask."""
        try:
            async for message in messages:
                if message.WhichOneof("kind") != "submit":
                    self._cancel(message.cancel.request_id)
                elif message.submit.HasField("grammar"):
                    task = asyncio.ensure_future(self._submit_guided(message.submit))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                else:
                    self._submit(message.submit)
        finally:
            self.end()

    def _submit(self, message: pb.Request) -> None:
        try:
            self._core.submit(codec.decode_request(message), self)
            self._running.add(message.id)
        except Exception as error:
            self._refuse(message.id, error)

    async def _submit_guided(self, message: pb.Request) -> None:
        """Submit a request whose grammar may have to be compiled first, while others go on."""
        self._submitting[message.id] = False
        try:
            await asyncio.to_thread(lambda: self._core.submit(codec.decode_request(message), self))
        except Exception as error:
            self._refuse(message.id, error)
            return
        cancelled = self._submitting.pop(message.id, None)
        if cancelled is None:
            return  # it has ended by now
        self._running.add(message.id)
        if cancelled or self._ended:
            self._core.cancel(message.id)

    def _refuse(self, request_id: str, error: Exception) -> None:
        if not isinstance(error, EngineError):  # a defect met by one request must not end its neighbours
            logger.error("request %s could not be submitted", request_id, exc_info=error)
            error = RequestFailed(f"the engine could not take it: {error!r}")
        self._take([RequestError(request_id, error)])

    async def batches(self) -> AsyncIterator[pb.StepBatch]:
        """Yield what comes, a batch a turn while the reader keeps up and turns are no shorter than PACE_S."""
        next_s = 0.0
        while not (self._ended and not self._unread):
            await self._news.wait()
            if (early_s := next_s - self._loop.time()) > 0:
                await asyncio.sleep(early_s)
            self._news.clear()
            while self._unread:
                end = _batch_end(self._unread)
                batch, self._unread = self._unread[:end], self._unread[end:]
                yield codec.encode_batch(batch)
            next_s = self._loop.time() + PACE_S


def _batch_end(unread: list[Delivery]) -> int:
    """How many of them go into one message: as many as may, up to the first that tells of a whole prompt."""
    for i, entry in enumerate(unread[:MAX_BATCH_ENTRIES]):
        if isinstance(entry, StepOutput) and entry.prompt:
            return i + 1
    return MAX_BATCH_ENTRIES


class _EngineService(xlane_pb2_grpc.EngineServicer):
    """The methods of `xlane.engine.v1.Engine`."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._connections: set[_Connection] = set()

    def end_connections(self) -> None:
        """Let every `Generate` return once it has written what it holds."""
        for connection in self._connections:
            connection.end()

    async def Generate(
        self, request_iterator: AsyncIterator[pb.ClientMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StepBatch]:
        connection = _Connection(self._core)
        self._connections.add(connection)
        listening = asyncio.ensure_future(connection.listen(request_iterator))
        try:
            await context.send_initial_metadata(())  # tells the client that it is connected
            async for batch in connection.batches():
                yield batch
            if listening.done() and (error := listening.exception()) is not None:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"a message that cannot be read: {error}"
                )
        finally:
            self._connections.discard(connection)
            listening.cancel()
            connection.cancel_all()

    async def Info(self, request: pb.InfoRequest, context: grpc.aio.ServicerContext) -> pb.EngineInfo:
        return codec.encode_info(self._core.info)

    async def Stats(self, request: pb.StatsRequest, context: grpc.aio.ServicerContext) -> pb.EngineStats:
        return codec.encode_stats(self._core.stats())

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.AdapterResponse:
        return await _adapter_response(
            request.name,
            lambda: self._core.load_adapter(request.name, request.folder, request.digest),
        )

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.AdapterResponse:
        return await _adapter_response(request.name, lambda: self._core.unload_adapter(request.name))

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        await asyncio.to_thread(self._core.drain, request.timeout_s)
        return pb.DrainResponse()


async def _adapter_response(name: str, work: Callable[[], str | None]) -> pb.AdapterResponse:
    """What comes of loading or unloading an adapter on another thread."""
    try:
        return pb.AdapterResponse(digest=await asyncio.to_thread(work) or "")
    except EngineError as error:
        return pb.AdapterResponse(error=codec.encode_error(RequestError(name, error)))


class _Health(health_pb2_grpc.HealthServicer):
    """The standard health service, answering from the engine as it is now."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self.leaving = False

    def _now(self, service: str) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse
        if service not in ("", SERVICE):
            return status(status=status.SERVICE_UNKNOWN)
        serving = not self.leaving and self._core.healthy()
        return status(status=status.SERVING if serving else status.NOT_SERVING)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        now = self._now(request.service)
        if now.status == now.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return now

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while not self.leaving:
            now = self._now(request.service)
            if now != last:
                yield now
            last = now
            await asyncio.sleep(HEALTH_PERIOD_S)


class RpcServer:
    """One engine on one address: `unix:/path` or `host:port`. Does not own the core: stopping leaves it running."""

    def __init__(self, core: EngineCore, address: str) -> None:
        self.address = address
        """Where it listens; after `start` with the port that port 0 became."""
        self._core = core
        self._service = _EngineService(core)
        self._health = _Health(core)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises OSError if the address cannot be had."""
        server = grpc.aio.server(options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)])
        xlane_pb2_grpc.add_EngineServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.address = _listen(server, self.address)
        await server.start()
        self._server = server

    async def stop(self, grace_s: float = 1.0) -> None:
        """Write what is ready, give other calls `grace_s` to end, close. Running requests are cancelled."""
        if self._server is None:
            return
        self._health.leaving = True
        self._service.end_connections()
        await self._server.stop(grace_s)
        self._server = None


def _listen(server: grpc.aio.Server, address: str) -> str:
    """Bind; return the address as clients must write it. Only this user may use a Unix socket."""
    if not address.startswith("unix:"):
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}; is the port free?") from error
        return f"{address.rpartition(':')[0]}:{port}"
    path = Path(address.removeprefix("unix:"))
    if len(bytes(path)) > MAX_SOCKET_PATH:
        raise OSError(f"the socket path {path} is longer than {MAX_SOCKET_PATH} bytes; choose a shorter one")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    path.chmod(0o600)
    return address


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait for one of them and drop the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _dead(core: EngineCore) -> None:
    """Return when the core has not been alive at two looks in a row; its waiters have heard of it by then."""
    looks = 0
    while looks < 2:
        await asyncio.sleep(LOOK_S)
        looks = 0 if core.alive() else looks + 1


async def serve(
    core: EngineCore,
    address: str,
    *,
    drain_s: float = 25.0,
    on_ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain for at most `drain_s` and stop the core. A second signal drains no more.
    If the core fails or hangs the process tells where its threads are and exits with ENGINE_DEAD.

    Call it in the main thread's event loop. `on_ready` is told the address when requests are taken.
    """
    loop, signalled, again = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (again if signalled.is_set() else signalled).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = RpcServer(core, address)
    try:
        await server.start()
        on_ready(server.address)
        await _first(signalled.wait(), _dead(core))
        if not signalled.is_set():
            faulthandler.dump_traceback()
            logger.error("the engine has failed or hangs; this process ends so that another can take over")
            # Not an orderly exit: a thread that hangs in the device would hold it up for ever.
            os._exit(ENGINE_DEAD)
        draining = asyncio.ensure_future(asyncio.to_thread(core.drain, drain_s))
        impatient = asyncio.ensure_future(again.wait())
        await asyncio.wait([draining, impatient], return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()
    finally:
        await asyncio.to_thread(core.stop)
        await server.stop()
