"""No token is lost or repeated when engines die under their streams; and a request that kills them is found.

First against a scripted engine, then against real processes that are killed.
"""

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from tests.support.fake_core import KILL_AT_ONCE_TOKEN, KILL_TOKEN, FakeCore, expected_ids, token_at
from xlane.engine import (
    DeadlineExceeded,
    EngineError,
    EngineInfo,
    EngineLost,
    EngineStats,
    EngineStopped,
    FinishReason,
    Overloaded,
    Request,
    RequestFailed,
    SamplingParams,
    StepOutput,
    Timing,
    TokenOutput,
)
from xlane.engine.local import LocalClient
from xlane.engine.process import RestartPolicy, Supervisor
from xlane.engine.replay import ReplayingClient
from xlane.engine.rpc_client import RpcClient

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

ROOT = Path(__file__).resolve().parents[2]
LOST = EngineLost("killed")


def make_request(
    number: int = 0, *, max_tokens: int = 6, prompt: tuple[int, ...] = (1, 2), **kwargs
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=number, stop_ids=kwargs.pop("stop_ids", ()))
    return Request(id=f"r{number}", prompt_ids=prompt, sampling=sampling, **kwargs)


def out(
    *ids: int, finish: FinishReason | None = None, cached: int = 0, timing: Timing | None = None
) -> StepOutput:
    return StepOutput("?", tuple(TokenOutput(id) for id in ids), finish, cached, timing)


class Scripted:
    """An `EngineClient` that says what it was told, one script an attempt, and keeps what it was asked."""

    def __init__(self, *scripts: list[StepOutput | EngineError], healthy: bool = True) -> None:
        self.scripts = list(scripts)
        self.asked: list[Request] = []
        self.healthy = healthy
        self.closed_streams = 0

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        self.asked.append(request)
        try:
            for item in self.scripts.pop(0):
                if isinstance(item, EngineError):
                    raise item
                yield StepOutput(request.id, item.tokens, item.finish_reason, item.cached_tokens, item.timing)
        finally:
            self.closed_streams += 1

    async def info(self) -> EngineInfo:
        return FakeCore().info

    async def load_adapter(self, name: str, folder: str) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def stats(self) -> EngineStats:
        raise LOST

    async def health(self) -> bool:
        return self.healthy

    async def drain(self, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


async def collect(client: ReplayingClient, request: Request) -> list[StepOutput]:
    return [output async for output in client.submit(request)]


def ids_of(outputs: list[StepOutput]) -> list[int]:
    return [token.id for output in outputs for token in output.tokens]


async def test_the_rest_is_asked_of_the_next_engine():
    timing = Timing(0.25, 0.5, 1.0)
    inner = Scripted(
        [out(7, cached=3), out(8, 9), LOST],
        [out(10, cached=5), LOST],
        [out(11, cached=6), out(12, finish=FinishReason.LENGTH, timing=timing)],
    )
    client = ReplayingClient(inner)
    outputs = await collect(client, make_request(resume_ids=(5,), max_tokens=7))
    assert ids_of(outputs) == [7, 8, 9, 10, 11, 12]
    assert [asked.resume_ids for asked in inner.asked] == [(5,), (5, 7, 8, 9), (5, 7, 8, 9, 10)]
    assert [asked.id for asked in inner.asked] == ["r0", "r0~1", "r0~2"]
    assert {output.request_id for output in outputs} == {"r0"}
    assert [output.cached_tokens for output in outputs] == [3, 0, 0, 0, 0]
    assert client.replays == 2
    last = outputs[-1].timing
    assert last is not None
    assert last.queue_s <= last.first_token_s < 0.4  # when the first engine sent it, not the last
    assert last.total_s > 1.0


async def test_how_long_it_waited_is_what_the_engine_of_its_first_token_said():
    """Also to who ends it before an engine does, and has the times of its first output only."""
    first, later = Timing(0.01, 0.02, 0.02), Timing(1.0, 2.0, 3.0)
    inner = Scripted(
        [out(7, timing=first), out(8), LOST],
        [out(9, timing=later), out(10, finish=FinishReason.LENGTH, timing=later)],
    )
    times = [output.timing for output in await collect(ReplayingClient(inner), make_request())]
    assert times[:2] == [first, None]
    for told in times[2:]:
        assert told is not None
        assert (told.queue_s, told.first_token_s) == (0.01, 0.02)
        assert told.total_s > 3.0


async def test_a_prompts_log_probabilities_are_asked_for_until_they_came():
    inner = Scripted([LOST], [out(7), LOST], [out(8, finish=FinishReason.LENGTH)])
    await collect(ReplayingClient(inner), make_request(prompt_logprobs=2))
    assert [asked.prompt_logprobs for asked in inner.asked] == [2, 2, None]


async def test_a_request_lost_before_its_first_token_waited_all_the_time():
    inner = Scripted(
        [LOST],
        [out(1, cached=2), out(2, finish=FinishReason.LENGTH, timing=Timing(0.25, 0.5, 1.0))],
        healthy=False,
    )
    asyncio.get_running_loop().call_later(0.1, setattr, inner, "healthy", True)
    outputs = await collect(ReplayingClient(inner), make_request())
    assert outputs[0].cached_tokens == 2
    assert outputs[-1].timing is not None
    assert outputs[-1].timing.queue_s <= outputs[-1].timing.first_token_s
    assert outputs[-1].timing.total_s >= 1.1


@pytest.mark.parametrize(
    ("stop_ids", "reason"), [((), FinishReason.LENGTH), ((2,), FinishReason.STOP)], ids=["length", "stop"]
)
async def test_an_end_whose_news_was_lost_is_made_up(stop_ids: tuple[int, ...], reason: FinishReason):
    inner = Scripted([out(1), out(2), LOST])
    outputs = await collect(ReplayingClient(inner), make_request(max_tokens=2, stop_ids=stop_ids))
    assert ids_of(outputs) == [1, 2]
    assert outputs[-1].finish_reason is reason
    assert outputs[-1].timing is not None
    assert len(inner.asked) == 1


async def test_no_engine_in_time_ends_the_stream():
    inner = Scripted([out(1), LOST], healthy=False)
    with pytest.raises(EngineLost, match=r"0\.1 s"):
        await collect(ReplayingClient(inner, recovery_timeout_s=0.1), make_request())


async def test_the_deadline_runs_on_while_no_engine_is_there():
    inner = Scripted([out(1), LOST], healthy=False)
    with pytest.raises(DeadlineExceeded, match="r0"):
        await collect(ReplayingClient(inner), make_request(deadline_s=0.1))
    inner = Scripted([out(1), LOST], [out(2, finish=FinishReason.LENGTH)])
    await collect(ReplayingClient(inner), make_request(deadline_s=5))
    assert inner.asked[1].deadline_s is not None
    assert 4 < inner.asked[1].deadline_s < 5


@pytest.mark.parametrize("refusal", [Overloaded("full", retry_after_s=60), EngineStopped("draining")])
async def test_no_deadline_passes_unseen_while_an_engine_refuses(refusal: EngineError):
    inner = Scripted([out(1), LOST], *[[refusal]] * 9)
    with pytest.raises(DeadlineExceeded, match="r0"):
        await asyncio.wait_for(collect(ReplayingClient(inner), make_request(deadline_s=0.1)), 10)
    assert all((asked.deadline_s or 0) > 0 for asked in inner.asked)


class Trial(Scripted):
    """Request r0 loses it twice, and makes no token before `end`."""

    def __init__(self) -> None:
        super().__init__([LOST], [LOST])
        self.begun, self.end = asyncio.Event(), asyncio.Event()

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        if not self.scripts:
            self.begun.set()
            await self.end.wait()
            self.scripts = [[out(1, finish=FinishReason.LENGTH)]] * 2
        async for output in super().submit(request):
            yield output


async def test_a_deadline_runs_on_during_the_trial_of_another():
    inner = Trial()
    client = ReplayingClient(inner)
    suspect = asyncio.ensure_future(collect(client, make_request(0)))
    await inner.begun.wait()
    with pytest.raises(DeadlineExceeded, match="r1"):
        await asyncio.wait_for(collect(client, make_request(1, deadline_s=0.05)), 10)
    late = asyncio.ensure_future(collect(client, make_request(2, deadline_s=60)))
    await asyncio.sleep(0.05)
    inner.end.set()
    assert ids_of(await suspect) == ids_of(await late) == [1]
    assert [asked.id for asked in inner.asked] == ["r0", "r0~1", "r0~2", "r2"]
    assert inner.asked[3].deadline_s is not None
    assert inner.asked[3].deadline_s < 60


@pytest.mark.parametrize("refusal", [Overloaded("full", retry_after_s=0.01), EngineStopped("draining")])
async def test_only_a_new_request_may_be_refused(refusal: EngineError):
    with pytest.raises(type(refusal)):
        await collect(ReplayingClient(Scripted([refusal])), make_request())
    inner = Scripted([out(1), LOST], [refusal], [out(2, finish=FinishReason.LENGTH)])
    outputs = await collect(ReplayingClient(inner), make_request())
    assert ids_of(outputs) == [1, 2]


async def test_other_errors_end_the_stream():
    inner = Scripted([out(1), LOST], [RequestFailed("nan")])
    with pytest.raises(RequestFailed, match="nan"):
        await collect(ReplayingClient(inner), make_request())


async def test_a_request_that_gets_nowhere_is_not_tried_for_ever():
    inner = Scripted([out(1), LOST], [LOST], [LOST], [LOST], [out(2)])
    with pytest.raises(RequestFailed, match="4 engines that were lost") as caught:
        await collect(ReplayingClient(inner), make_request())
    assert caught.value.__cause__ is LOST
    assert len(inner.asked) == 4


async def test_an_engine_that_ended_in_order_or_was_not_reached_makes_nobody_a_suspect():
    over = EngineLost("over", blameless=True)
    inner = Scripted(*[[over]] * 9, [LOST], [out(1), over], [out(2, finish=FinishReason.LENGTH)])
    assert ids_of(await collect(ReplayingClient(inner), make_request())) == [1, 2]


@pytest.mark.parametrize("made", [(), (2,), (2, 3)])
async def test_what_an_engine_that_ends_cuts_short_goes_on_in_the_next(made: tuple[int, ...]):
    abort, end = FinishReason.ABORT, FinishReason.LENGTH
    inner = Scripted([out(1), out(*made, finish=abort, timing=Timing(1, 1, 1))], [out(9, finish=end)])
    outputs = await collect(ReplayingClient(inner), make_request(max_tokens=5))
    assert ids_of(outputs) == [1, *made, 9]
    assert [output.finish_reason for output in outputs if output.finish_reason] == [end]
    assert inner.asked[1].resume_ids == (1, *made)


@pytest.mark.parametrize("drains", [False, True])
async def test_what_an_engine_that_we_end_cuts_short_has_ended(drains: bool):
    inner = Scripted([out(1), out(2, finish=FinishReason.ABORT)])
    client = ReplayingClient(inner)
    outputs = client.submit(make_request())
    await anext(outputs)
    if drains:
        await client.drain(0)
    else:
        client.leave()
    assert [output.finish_reason async for output in outputs] == [FinishReason.ABORT]


async def test_a_new_token_ends_suspicion_but_not_for_ever():
    steps = [[out(n), LOST] for n in range(20)]
    with pytest.raises(RequestFailed, match="7 engines"):
        await collect(ReplayingClient(Scripted(*steps), max_losses=7), make_request(max_tokens=30))


@pytest.mark.parametrize(
    "end", [ReplayingClient.close, lambda client: client.drain(0.0)], ids=["close", "drain"]
)
async def test_closing_and_draining_end_those_who_wait(end: Callable[[ReplayingClient], Awaitable[None]]):
    inner = Scripted([out(1), LOST], healthy=False)
    client = ReplayingClient(inner)
    running = asyncio.ensure_future(collect(client, make_request()))
    await asyncio.sleep(0.05)
    await end(client)
    with pytest.raises(EngineLost, match="closed"):
        await asyncio.wait_for(running, 2)


async def test_a_reader_that_leaves_closes_the_engines_stream():
    inner = Scripted([out(1), LOST], [out(2), out(3)])
    async with aclosing(ReplayingClient(inner).submit(make_request())) as outputs:
        assert ids_of([await anext(outputs), await anext(outputs)]) == [1, 2]
    assert inner.closed_streams == 2


async def test_over_an_engine_in_this_process_it_only_passes_on():
    core = FakeCore()
    client = ReplayingClient(LocalClient(core))
    request = make_request(max_tokens=20)
    assert ids_of(await collect(client, request)) == expected_ids(request)
    assert client.replays == 0
    core.stop()


class Mortal(Scripted):
    """Simulates an engine that dies when a request with KILL_TOKEN reaches its third token, up to two of which may still
    be on their way to the client then. Times are random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        self.deaths = 0

    async def health(self) -> bool:
        await asyncio.sleep(0.002)  # it takes a while to start an engine
        return True

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        life = self.deaths
        for position in range(len(request.resume_ids), request.sampling.max_tokens):
            await asyncio.sleep(self.chance.choice([0, 0, 0.001]))
            if life == self.deaths and KILL_TOKEN in request.prompt_ids:
                self.deaths += position + self.chance.randrange(3) >= 2
            if life != self.deaths:
                raise LOST
            last = position + 1 == request.sampling.max_tokens
            yield StepOutput(
                request.id, (token_at(request, position),), FinishReason.LENGTH if last else None
            )


@pytest.mark.parametrize("killers", [1, 2])
async def test_no_bystander_is_ever_blamed(killers: int):
    for seed in range(25):
        engine = Mortal(seed)
        client = ReplayingClient(engine, max_losses=50)
        good = [make_request(n, max_tokens=20) for n in range(6)]
        bad = [make_request(90 + n, max_tokens=20, prompt=(KILL_TOKEN,)) for n in range(killers)]
        results = await asyncio.gather(
            *(collect(client, request) for request in [*good, *bad]), return_exceptions=True
        )
        for request, outputs in zip(good, results):
            assert not isinstance(outputs, BaseException), seed
            assert ids_of(outputs) == expected_ids(request)
        assert [type(result) for result in results[6:]] == [RequestFailed] * killers
        assert engine.deaths <= 10 * killers


@asynccontextmanager
async def killable(
    turn_s: float = 0.002, drain_s: float = 5.0, **options
) -> AsyncIterator[tuple[Supervisor, ReplayingClient]]:
    """An engine process that is started again whenever it dies, and a client that replays over it."""
    turns = ["--turn-s", str(turn_s), "--drain-s", str(drain_s)]
    supervisor = Supervisor(
        [sys.executable, "-m", "tests.support.fake_core", *turns],
        policy=RestartPolicy(first_delay_s=0.01),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    client = ReplayingClient(RpcClient(supervisor.address), recovery_timeout_s=30, **options)
    try:
        await supervisor.start()
        yield supervisor, client
    finally:
        await client.close()
        await supervisor.stop(5)


def lives(supervisor: Supervisor) -> int:
    return Counter(event.kind for event in supervisor.events)["ready"]


async def kill_often(supervisor: Supervisor, times: int) -> None:
    """SIGKILL at moments that differ from run to run of the loop, but not from test to test."""
    chance = random.Random(0)
    for life in range(1, times + 1):
        while lives(supervisor) < life:
            await asyncio.sleep(0.002)
        await asyncio.sleep(chance.uniform(0.05, 0.25))
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)


async def test_killed_engines_cost_no_token():
    kills = 6
    requests = [make_request(n, max_tokens=200 + 20 * n, prompt=(n + 1, 2, 3)) for n in range(12)]
    async with killable(turn_s=0.004, max_losses=20) as (supervisor, client):
        killing = asyncio.ensure_future(kill_often(supervisor, kills))
        streams = await asyncio.gather(*(collect(client, request) for request in requests))
        await killing
        assert client.replays >= 12
    assert supervisor.restarts >= kills - 1
    for request, outputs in zip(requests, streams, strict=True):
        assert ids_of(outputs) == expected_ids(request)
        assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.LENGTH]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert {output.request_id for output in outputs} == {request.id}


async def test_an_engine_that_is_told_to_end_costs_no_token():
    requests = [make_request(n, max_tokens=300, prompt=(n + 1, 2, 3)) for n in range(3)]
    async with killable(turn_s=0.01, drain_s=0.05) as (supervisor, client):
        streams = [client.submit(request) for request in requests]
        firsts = [await anext(stream) for stream in streams]
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGTERM)

        async def whole(first: StepOutput, stream: AsyncIterator[StepOutput]) -> list[int]:
            return ids_of([first, *[output async for output in stream]])

        told = await asyncio.gather(*map(whole, firsts, streams))
        assert supervisor.restarts == 1
    assert told == [expected_ids(request) for request in requests]


@pytest.mark.parametrize("token", [KILL_TOKEN, KILL_AT_ONCE_TOKEN], ids=["after two tokens", "at once"])
async def test_a_killer_is_found_and_its_neighbours_live(token: int):
    requests = [make_request(n, max_tokens=150, prompt=(n + 1, 2, 3)) for n in range(7)]
    async with killable() as (supervisor, client):
        running = [asyncio.ensure_future(collect(client, request)) for request in requests]
        with pytest.raises(RequestFailed, match="not tried again"):
            await collect(client, make_request(99, max_tokens=50, prompt=(token,)))
        streams = await asyncio.gather(*running)
        deaths = Counter(event.kind for event in supervisor.events)["died"]
    assert [ids_of(outputs) for outputs in streams] == [expected_ids(request) for request in requests]
    assert 4 <= deaths <= 8  # four, and some more when its first tokens die with the engine
