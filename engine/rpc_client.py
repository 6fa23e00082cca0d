"""An engine in another process, as an `EngineClient`: one gRPC call carries all requests and all their outputs.

The call is opened by the first request and again by the first one after it broke. When it breaks, every request on it
ends with EngineLost; running them again is `replay`'s business. Knows the wire; not who runs the engine.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .errors import EngineError, EngineLost, InvalidRequest
from .local import Streams
from .proto import codec, xlane_pb2_grpc
from .proto import xlane_pb2 as pb
from .request import EngineInfo, EngineStats, Request, StepOutput
from .rpc_server import CHANNEL_OPTIONS, SERVICE

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
"""How long a request waits for a connection to an engine that does not refuse it."""
CALL_TIMEOUT_S = 5.0
"""How long `info`, `stats` and `health` wait for their answer."""
LOAD_TIMEOUT_S = 120.0
"""How long an adapter may take to be loaded."""
DRAIN_MARGIN_S = 5.0
"""How much longer than the drain itself we wait for its answer."""
POLL_S = 0.05
"""Pause between two looks at an engine that is not ready yet."""

_CLIENT_OPTIONS = (
    # While the engine is away gRPC tries again after 0.05 s, then ever later, at most each second.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # An engine is on a private network; a proxy that the environment names is for what is not.
    ("grpc.enable_http_proxy", 0),
    # Clients do not share connections, and so neither their back-off.
    ("grpc.use_local_subchannel_pool", 1),
)


class _Connection:
    """One call of `Generate`, from its opening until it breaks."""

    def __init__(
        self, stub: xlane_pb2_grpc.EngineStub, address: str, prepare: Callable[[], Awaitable[None]]
    ) -> None:
        """`prepare` is called once it answers, and is done, or has raised EngineLost, before any request."""
        self._address = address
        self._prepare = prepare
        self._outbox: asyncio.Queue[pb.ClientMessage | None] = asyncio.Queue()
        self._call = stub.Generate(self._messages())
        self._answered, self._prepared = asyncio.Event(), asyncio.Event()
        self._reading = asyncio.ensure_future(self._read())
        self._loss = ""
        self.streams = Streams()

    @property
    def lost(self) -> EngineLost | None:
        """Why it is broken, for a request that was not sent; None while it is not."""
        return EngineLost(self._loss, blameless=True) if self._loss else None

    async def opened(self) -> None:
        """Return when the engine has answered and is prepared. Raises EngineLost if it cannot be reached or has gone again."""
        try:
            await asyncio.wait_for(self._answered.wait(), CONNECT_TIMEOUT_S)
        except TimeoutError:
            self._cancel(f"it did not answer in {CONNECT_TIMEOUT_S:g} s")
        await self._prepared.wait()
        if self.lost is not None:
            raise self.lost

    def send(self, message: pb.ClientMessage) -> None:
        """Send soon; a connection that is broken drops it."""
        self._outbox.put_nowait(message)

    async def _messages(self) -> AsyncIterator[pb.ClientMessage]:
        while (message := await self._outbox.get()) is not None:
            yield message

    async def _read(self) -> None:
        reason = "the engine ended it"
        try:
            await self._call.wait_for_connection()
            self._answered.set()
            await self._prepare()
            self._prepared.set()
            async for batch in self._call:
                self.streams.deliver(codec.decode_batch(batch))
        except EngineLost as error:
            reason = str(error)
        except grpc.RpcError as error:
            reason = _reason(error)
        except asyncio.CancelledError:
            reason = "it was cancelled"
        finally:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if not self._loss:
            self._loss = f"the connection to the engine at {self._address} is lost: {reason}"
            self._answered.set()
            self._prepared.set()
            self._outbox.put_nowait(None)
            self.streams.fail(self._loss)

    def cancel_all(self) -> None:
        """Ask for the end of all that runs; it ends with ABORT."""
        for request_id in self.streams.ids:
            self.send(pb.ClientMessage(cancel=pb.Cancel(request_id=request_id)))

    async def close(self) -> None:
        """End the call; what still runs ends with EngineLost."""
        self._cancel("the client ended it")
        await asyncio.wait([self._reading])

    def _cancel(self, reason: str) -> None:
        self._lose(reason)
        self._call.cancel()
        self._reading.cancel()  # a call that was never connected does not wake those who wait for it


class _LoadedAdapter(NamedTuple):
    """Where an adapter came from, and what it was."""

    folder: str
    digest: str


class RpcClient:
    """An `EngineClient` for an engine at `unix:/path` or `host:port`. Made and used in one event loop."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=[*CHANNEL_OPTIONS, *_CLIENT_OPTIONS])
        self._stub = xlane_pb2_grpc.EngineStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._connection: _Connection | None = None
        self._adapters: dict[str, _LoadedAdapter | None] = {}
        """What this client had loaded, and None for what it had unloaded: an engine that comes anew is told again."""
        self._closed = False

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `EngineClient.submit`."""
        message = pb.ClientMessage(submit=codec.encode_request(request))
        connection = await self._connected()
        connection.streams.open(request.id)
        running = True
        connection.send(message)
        try:
            async for output in connection.streams.read(request.id):
                running = output.finish_reason is None
                yield output
        except EngineError:
            running = False
            raise
        finally:
            connection.streams.close(request.id)
            if running:
                connection.send(pb.ClientMessage(cancel=pb.Cancel(request_id=request.id)))

    async def _connected(self) -> _Connection:
        """The connection that lives, or a new one."""
        self._refuse_if_closed()
        if self._connection is None or self._connection.lost:
            self._connection = _Connection(self._stub, self.address, self._restore_adapters)
        connection = self._connection
        await connection.opened()
        return connection

    async def _restore_adapters(self) -> None:
        """Give an engine that may be a new one the adapters that the last one had, before any request. What cannot be
        loaded any more is missed by the requests that ask for it, and by nobody else. Raises EngineLost."""
        if not self._adapters:
            return
        there = (await self.info()).adapters
        for name in there:
            if name in self._adapters and self._adapters[name] is None:
                await self._unload(name)
        for name, loaded in [*self._adapters.items()]:
            try:
                if loaded is not None:
                    await self._load(name, *loaded)
            except InvalidRequest as error:
                logger.error("the engine that came anew is without the adapter %r: %s", name, error)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when the engine answers and is healthy. Raises EngineLost after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.health():
                    self._refuse_if_closed()
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise EngineLost(f"the engine at {self.address} was not ready in {timeout_s:g} s") from None

    async def info(self) -> EngineInfo:
        """See `EngineClient.info`."""
        return codec.decode_info(await self._ask(self._stub.Info, pb.InfoRequest(), CALL_TIMEOUT_S))

    async def load_adapter(self, name: str, folder: str) -> None:
        """See `EngineClient.load_adapter`."""
        await self._connected()  # what an engine is made to have again comes before what is new
        self._adapters[name] = _LoadedAdapter(folder, await self._load(name, folder, ""))

    async def unload_adapter(self, name: str) -> None:
        """See `EngineClient.unload_adapter`."""
        await self._connected()
        await self._unload(name)
        self._adapters[name] = None

    async def _load(self, name: str, folder: str, digest: str) -> str:
        question = pb.LoadAdapterRequest(name=name, folder=folder, digest=digest)
        return (await self._adapt(self._stub.LoadAdapter, question)).digest

    async def _unload(self, name: str) -> None:
        await self._adapt(self._stub.UnloadAdapter, pb.UnloadAdapterRequest(name=name))

    async def _adapt(self, method: Callable[..., Any], question: object) -> pb.AdapterResponse:
        answer: pb.AdapterResponse = await self._ask(method, question, LOAD_TIMEOUT_S)
        if answer.HasField("error"):
            raise codec.decode_error(answer.error).error
        return answer

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        return codec.decode_stats(await self._ask(self._stub.Stats, pb.StatsRequest(), CALL_TIMEOUT_S))

    async def health(self) -> bool:
        """See `EngineClient.health`."""
        try:
            return await self.serving()
        except EngineLost:
            return False

    async def serving(self) -> bool:
        """Whether the engine that answers takes requests. Raises EngineLost if none answers."""
        question = health_pb2.HealthCheckRequest(service=SERVICE)
        answer = await self._ask(self._health.Check, question, CALL_TIMEOUT_S)  # pyright: ignore[reportAttributeAccessIssue] (untyped stub)
        return answer.status == answer.SERVING

    def cancel_all(self) -> None:
        """Ask the engine to end all requests of this client; each ends with ABORT."""
        if self._connection is not None:
            self._connection.cancel_all()

    async def drain(self, timeout_s: float) -> None:
        """See `EngineClient.drain`."""
        question = pb.DrainRequest(timeout_s=timeout_s)
        await self._ask(self._stub.Drain, question, timeout_s + DRAIN_MARGIN_S)

    async def close(self) -> None:
        """See `EngineClient.close`."""
        self._closed = True
        if self._connection is not None:
            await self._connection.close()
        await self._channel.close()

    async def _ask(self, method: Callable[..., Any], question: object, timeout_s: float) -> Any:
        """One question, one answer. Raises EngineLost if none comes."""
        self._refuse_if_closed()
        try:
            return await method(question, timeout=timeout_s)
        except grpc.RpcError as error:
            raise EngineLost(f"the engine at {self.address} does not answer: {_reason(error)}") from error
        except asyncio.CancelledError:
            self._refuse_if_closed()  # then it was `close` that cancelled the call, not somebody our caller
            raise

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineLost("this client is closed; make a new RpcClient")


def _reason(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
