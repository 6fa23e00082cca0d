"""What every `EngineClient` must do, whatever carries it: in this process, over gRPC, and replaying over either.

A new engine is added by one entry in CORES. Tests that need an engine to misbehave use the fake one alone.
"""

import asyncio
import itertools
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.fake_core import FAIL_TOKEN, VOCAB_SIZE, FakeCore, expected_ids, token_at
from xlane.engine import (
    DeadlineExceeded,
    EngineClient,
    EngineLost,
    EngineStopped,
    FinishReason,
    InvalidRequest,
    Overloaded,
    Request,
    RequestFailed,
    SamplingParams,
    StepOutput,
    rpc_client,
    rpc_server,
)
from xlane.engine.local import EngineCore, LocalClient, Sink
from xlane.engine.replay import ReplayingClient
from xlane.engine.rpc_client import RpcClient
from xlane.engine.rpc_server import RpcServer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

_numbers = itertools.count()


@dataclass(frozen=True)
class Served:
    """An engine under test and what it must answer."""

    core: EngineCore
    expected: Callable[[Request], list[int]]


@contextmanager
def serve_fake() -> Iterator[Served]:
    core = FakeCore()
    yield Served(core, expected_ids)
    core.stop()


CORES = {"fake": serve_fake}
"""Engines by name."""


@asynccontextmanager
async def connect(kind: str, core: EngineCore, folder: Path) -> AsyncIterator[EngineClient]:
    """A client of the given kind."""
    if kind.startswith("replaying-"):
        async with connect(kind.removeprefix("replaying-"), core, folder) as inner:
            client = ReplayingClient(inner, recovery_timeout_s=5)
            yield client
            await client.close()
    elif kind == "local":
        client = LocalClient(core)
        yield client
        await client.close()
    else:
        server = RpcServer(core, f"unix:{folder}/engine.sock" if kind == "unix" else "127.0.0.1:0")
        await server.start()
        client = RpcClient(server.address)
        await client.wait_ready(5)
        yield client
        await client.close()
        await server.stop()


CLIENTS = ("local", "unix", "tcp", "replaying-local", "replaying-unix")


@pytest.fixture(params=CORES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with CORES[request.param]() as served:
        yield served


@pytest.fixture(params=CLIENTS)
async def client(
    request: pytest.FixtureRequest, served: Served, tmp_path: Path
) -> AsyncIterator[EngineClient]:
    async with connect(request.param, served.core, tmp_path) as client:
        yield client


@pytest.fixture
def fake(served: Served) -> FakeCore:
    if not isinstance(served.core, FakeCore):
        pytest.skip("needs an engine that misbehaves when told")
    return served.core


def make_request(
    *,
    prompt: tuple[int, ...] = (1, 2, 3, 4, 5),
    max_tokens: int = 12,
    deadline_s: float | None = None,
    **sampling,
) -> Request:
    return Request(
        id=f"r{next(_numbers)}",
        prompt_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        deadline_s=deadline_s,
    )


async def collect(client: EngineClient, request: Request) -> list[StepOutput]:
    return [output async for output in client.submit(request)]


def ids_of(outputs: list[StepOutput]) -> list[int]:
    return [token.id for output in outputs for token in output.tokens]


async def until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_stream_has_every_token_and_one_end(client: EngineClient, served: Served):
    request = make_request()
    outputs = await collect(client, request)
    assert ids_of(outputs) == served.expected(request)
    assert {output.request_id for output in outputs} == {request.id}
    *before, last = outputs
    assert [output.finish_reason for output in before] == [None] * len(before)
    assert last.finish_reason is FinishReason.LENGTH
    # Who ends it before its end has the times of the first output.
    assert [at for at, output in enumerate(outputs) if output.timing] in ([0, len(before)], [0])
    first, end = outputs[0].timing, last.timing
    assert first is not None
    assert end is not None
    assert 0 <= first.queue_s <= first.first_token_s <= first.total_s <= end.total_s
    assert (first.queue_s, first.first_token_s) == (end.queue_s, end.first_token_s)


async def test_a_stop_token_ends_the_stream_and_is_its_last(client: EngineClient, served: Served):
    request = make_request()
    stop = served.expected(request)[5]
    request = replace(request, sampling=replace(request.sampling, stop_ids=(stop,)))
    outputs = await collect(client, request)
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert ids_of(outputs) == served.expected(request)
    assert ids_of(outputs)[-1] == stop


async def test_resumed_tokens_are_not_sent_again(client: EngineClient, served: Served):
    request = make_request()
    whole = served.expected(request)
    outputs = await collect(client, replace(request, resume_ids=tuple(whole[:5])))
    assert ids_of(outputs) == whole[5:]


@pytest.mark.parametrize("alternatives", [0, 3])
async def test_a_prompts_log_probabilities_come_once_with_the_first_output(
    client: EngineClient, alternatives: int
):
    asked = replace(make_request(prompt=(7, 8, 9), max_tokens=3), prompt_logprobs=alternatives)
    first, *later = await collect(client, asked)
    assert [(token.id, token.logprob) for token in first.prompt] == [(8, -1 / 8), (9, -2 / 8)]
    assert first.prompt[1].top == tuple((9 + j, -(2 + j) / 8) for j in range(alternatives))
    assert not any(output.prompt for output in later)


async def test_biases_and_a_least_length_reach_the_engine(client: EngineClient, served: Served):
    request = make_request()
    whole = served.expected(request)
    stopped = {"stop_ids": (whole[0], whole[4]), "min_tokens": 3}
    biased = {"logit_bias": ((whole[1], -100.0), (901, 9.5))}
    asked = replace(request, sampling=replace(request.sampling, **stopped, **biased))
    assert ids_of(await collect(client, asked)) == [901, 901, *whole[2:5]]


async def test_many_streams_at_once(client: EngineClient, served: Served):
    requests = [make_request(prompt=tuple(range(1, 2 + n)), max_tokens=5 + n, seed=n) for n in range(24)]
    streams = await asyncio.gather(*(collect(client, request) for request in requests))
    assert [ids_of(outputs) for outputs in streams] == [served.expected(request) for request in requests]


async def test_closing_a_stream_frees_its_lane(client: EngineClient, served: Served):
    async with aclosing(client.submit(make_request(max_tokens=3000))) as outputs:  # pyright: ignore[reportArgumentType]
        await anext(outputs)
        assert (await client.stats()).lanes_active == 1
    await until(lambda: served.core.stats().lanes_active == 0)


async def test_cancelling_the_reader_frees_its_lane(client: EngineClient, served: Served):
    reader = asyncio.ensure_future(collect(client, make_request(max_tokens=3000)))
    await until(lambda: served.core.stats().lanes_active == 1)
    reader.cancel()
    await asyncio.wait([reader])
    await until(lambda: served.core.stats().lanes_active == 0)


async def test_a_stream_that_is_never_read_is_never_asked_for(client: EngineClient, served: Served):
    client.submit(make_request())
    await asyncio.sleep(0.02)
    assert served.core.stats().steps == 0


async def test_a_slow_reader_holds_up_nobody(client: EngineClient, served: Served):
    slow, quick = make_request(max_tokens=50), make_request(max_tokens=50, seed=1)
    async with aclosing(client.submit(slow)) as outputs:  # pyright: ignore[reportArgumentType]
        first = await anext(outputs)
        assert ids_of(await collect(client, quick)) == served.expected(quick)
        await until(
            lambda: served.core.stats().lanes_active == 0
        )  # the engine is done with the slow one as well
        rest = [output async for output in outputs]
    assert ids_of([first, *rest]) == served.expected(slow)


async def test_an_impossible_request_is_refused_on_first_iteration(client: EngineClient, served: Served):
    outputs = client.submit(make_request(prompt=(served.core.info.vocab_size,)))
    with pytest.raises(InvalidRequest, match="vocab"):
        await anext(outputs)
    assert (await collect(client, make_request()))[-1].finish_reason is FinishReason.LENGTH


async def test_an_id_that_runs_is_refused_and_runs_on(client: EngineClient, served: Served):
    request = make_request(max_tokens=40)
    async with aclosing(client.submit(request)) as outputs:  # pyright: ignore[reportArgumentType]
        first = await anext(outputs)
        with pytest.raises(InvalidRequest, match=request.id):
            await collect(client, request)
        rest = [output async for output in outputs]
    assert ids_of([first, *rest]) == served.expected(request)


async def test_a_full_queue_is_overloaded(client: EngineClient, fake: FakeCore):
    fake.freeze()
    info = await client.info()
    waiting = [
        asyncio.ensure_future(collect(client, make_request())) for _ in range(info.lanes + info.max_queued)
    ]
    await until(lambda: fake.stats().queued == info.max_queued)
    with pytest.raises(Overloaded, match="waiting") as caught:
        await collect(client, make_request())
    assert caught.value.retry_after_s == 0.25
    fake.freeze(False)
    assert {outputs[-1].finish_reason for outputs in await asyncio.gather(*waiting)} == {FinishReason.LENGTH}


async def test_a_request_that_fails_fails_alone(client: EngineClient, fake: FakeCore):
    running = asyncio.ensure_future(collect(client, good := make_request(max_tokens=30)))
    heard: list[StepOutput] = []

    async def listen() -> None:
        async for output in client.submit(make_request(prompt=(FAIL_TOKEN,))):
            heard.append(output)

    with pytest.raises(RequestFailed, match=str(FAIL_TOKEN)):
        await listen()
    assert len(ids_of(heard)) == 2
    assert ids_of(await running) == expected_ids(good)


async def test_a_deadline_is_kept(client: EngineClient, fake: FakeCore):
    with pytest.raises(DeadlineExceeded):
        await collect(client, make_request(max_tokens=3000, deadline_s=0.05))


async def test_logprobs_and_cached_tokens_arrive_as_they_left(client: EngineClient, fake: FakeCore):
    request = make_request(logprobs=True, top_logprobs=4, max_tokens=5)
    outputs = await collect(client, request)
    assert [t for output in outputs for t in output.tokens] == [token_at(request, i) for i in range(5)]
    assert outputs[0].cached_tokens == 1
    assert not any(output.cached_tokens for output in outputs[1:])
    plain = await collect(
        client, replace(request, id="plain", sampling=SamplingParams(max_tokens=5, logprobs=True))
    )
    assert plain[0].tokens[0].top == ()


async def test_info_and_stats_are_the_engines(client: EngineClient, served: Served):
    assert await client.info() == served.core.info
    request = make_request(max_tokens=7)
    before = served.core.stats()
    await collect(client, request)
    stats = await client.stats()
    assert stats.decode_tokens + stats.prefill_tokens > before.decode_tokens + before.prefill_tokens
    assert stats.compiles_after_ready == 0


async def test_health_follows_the_engine(client: EngineClient, fake: FakeCore):
    assert await client.health()
    fake.sick = True
    assert not await client.health()
    fake.sick = False
    assert await client.health()


async def test_a_drain_lets_the_running_finish_and_refuses_new_ones(client: EngineClient, served: Served):
    request = make_request(max_tokens=60)
    running = asyncio.ensure_future(collect(client, request))
    await until(lambda: served.core.stats().lanes_active == 1)
    draining = asyncio.ensure_future(client.drain(5))
    await asyncio.sleep(0.01)
    with pytest.raises(EngineStopped):
        await collect(client, make_request())
    await draining
    assert ids_of(await running) == served.expected(request)


async def test_a_drain_aborts_what_takes_too_long(client: EngineClient, fake: FakeCore):
    running = asyncio.ensure_future(collect(client, make_request(max_tokens=4000)))
    await until(lambda: fake.stats().lanes_active == 1)
    fake.freeze()
    await client.drain(0.05)
    assert (await running)[-1].finish_reason is FinishReason.ABORT


async def test_an_engine_that_stops_aborts_what_runs(client: EngineClient, fake: FakeCore):
    running = asyncio.ensure_future(collect(client, make_request(max_tokens=4000)))
    await until(lambda: fake.stats().lanes_active == 1)
    if isinstance(client, ReplayingClient):
        client.leave()  # else it would look for the next one
    await asyncio.to_thread(fake.stop)
    assert (await running)[-1].finish_reason is FinishReason.ABORT
    assert not await client.health()


async def test_closing_the_client_ends_what_runs_and_frees_its_lanes(client: EngineClient, served: Served):
    running = asyncio.ensure_future(collect(client, make_request(max_tokens=3000)))
    await until(lambda: served.core.stats().lanes_active == 1)
    await client.close()
    with pytest.raises(EngineLost):
        await running
    with pytest.raises(EngineLost):
        await collect(client, make_request())
    assert not await client.health()
    await until(lambda: served.core.stats().lanes_active == 0)


async def test_one_clients_requests_are_not_anothers(served: Served, tmp_path: Path):
    async with (
        connect("unix", served.core, tmp_path) as one,
        connect("local", served.core, tmp_path) as other,
    ):
        request = make_request(max_tokens=300)
        async with aclosing(one.submit(request)) as outputs:  # pyright: ignore[reportArgumentType]
            await anext(outputs)
            with pytest.raises(InvalidRequest, match=request.id):
                await collect(other, request)
            await anext(outputs)
            assert served.core.stats().lanes_active == 1


async def test_only_this_user_may_use_the_socket(served: Served, tmp_path: Path):
    async with connect("unix", served.core, tmp_path / "private"):
        assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "private/engine.sock").stat().st_mode) == 0o600


async def test_an_address_that_is_taken_is_an_error(served: Served, tmp_path: Path):
    first = RpcServer(served.core, "127.0.0.1:0")
    await first.start()
    with pytest.raises(OSError, match="cannot listen"):
        await RpcServer(served.core, first.address).start()
    await first.stop()
    with pytest.raises(OSError, match="longer than"):
        await RpcServer(served.core, f"unix:{tmp_path}/{'x' * 120}.sock").start()


async def test_no_engine_is_a_lost_engine(tmp_path: Path):
    client = RpcClient(f"unix:{tmp_path}/nobody.sock")
    assert not await client.health()
    for asked in (collect(client, make_request()), client.info(), client.stats(), client.wait_ready(0.1)):
        with pytest.raises(EngineLost, match=r"nobody\.sock"):
            await asked
    await client.close()


async def test_an_engine_that_says_nothing_is_a_lost_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rpc_client, "CONNECT_TIMEOUT_S", 0.1)
    mute = socket.create_server(("127.0.0.1", 0))
    client = RpcClient(f"127.0.0.1:{mute.getsockname()[1]}")
    started = asyncio.get_running_loop().time()
    results = await asyncio.gather(
        *(collect(client, make_request()) for _ in range(5)), return_exceptions=True
    )
    assert [type(result) for result in results] == [EngineLost] * 5
    assert asyncio.get_running_loop().time() - started < 1  # they wait side by side, not one after the other
    await client.close()
    mute.close()


async def test_those_who_watch_the_health_hear_of_a_change(
    fake: FakeCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rpc_server, "HEALTH_PERIOD_S", 0.01)
    async with (
        connect("unix", fake, tmp_path),
        grpc.aio.insecure_channel(f"unix:{tmp_path}/engine.sock") as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", rpc_server.SERVICE):
            fake.sick = False
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            fake.sick = True
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_client_finds_an_engine_that_comes_later(served: Served, tmp_path: Path):
    client = RpcClient(f"unix:{tmp_path}/engine.sock")
    waiting = asyncio.ensure_future(client.wait_ready(5))
    await asyncio.sleep(0.2)
    async with connect("unix", served.core, tmp_path):
        await waiting
        request = make_request()
        assert ids_of(await collect(client, request)) == served.expected(request)
    await client.close()


async def test_a_lost_connection_ends_streams_and_is_made_anew(served: Served, tmp_path: Path):
    async with connect("unix", served.core, tmp_path) as doomed_clients_server:
        client = RpcClient(f"unix:{tmp_path}/engine.sock")
        running = asyncio.ensure_future(collect(client, make_request(max_tokens=3000)))
        await until(lambda: served.core.stats().lanes_active == 1)
        await doomed_clients_server.close()
    with pytest.raises(EngineLost, match="lost"):
        await running
    await until(lambda: served.core.stats().lanes_active == 0)
    async with connect("unix", served.core, tmp_path):
        await client.wait_ready(5)
        request = make_request()
        assert ids_of(await collect(client, request)) == served.expected(request)
    await client.close()


def test_the_vocabulary_of_the_fake_holds_its_special_tokens():
    assert FAIL_TOKEN < VOCAB_SIZE


class SlowCore(FakeCore):
    """Takes a grammar when `compiled` is set, as if that had to be compiled for so long."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled, self.cancelled = threading.Event(), list[str]()

    def submit(self, request: Request, sink: Sink) -> None:
        if request.grammar is not None:
            assert self.compiled.wait(20)
        super().submit(request, sink)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        super().cancel(request_id)


@pytest.mark.parametrize("kind", ["local", "unix"])
async def test_a_grammar_that_takes_long_holds_up_no_other_request_and_may_be_cancelled(
    kind: str, tmp_path: Path
):
    core = SlowCore()
    async with connect(kind, core, tmp_path) as client:
        guided = [replace(make_request(max_tokens=500), grammar="slow") for _ in range(2)]
        taken, left = (asyncio.ensure_future(collect(client, one)) for one in guided)
        await asyncio.sleep(0.05)
        free = make_request()
        assert ids_of(await collect(client, free)) == expected_ids(free)
        left.cancel()
        await asyncio.sleep(0.05)
        assert not taken.done()
        core.compiled.set()
        assert ids_of(await taken) == expected_ids(guided[0])
        await until(lambda: guided[1].id in core.cancelled and core.stats().lanes_active == 0)
    core.stop()
