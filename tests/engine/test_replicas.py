"""Several engines as one: who gets a request, who is not used, and that nothing is lost while they come and go.

First in this process, then with real ones that are restarted and killed under load.
"""

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_core import KILL_TOKEN, FakeCore, expected_ids, token_at
from xlane.engine import (
    EngineLost,
    EngineStopped,
    FinishReason,
    Overloaded,
    Request,
    RequestFailed,
    SamplingParams,
    StepOutput,
)
from xlane.engine import fleet as fleet_module
from xlane.engine.address import check_address, resolve
from xlane.engine.fleet import Fleet
from xlane.engine.local import LocalClient
from xlane.engine.process import RestartPolicy, Supervisor
from xlane.engine.replay import ReplayingClient
from xlane.engine.replicas import Replicas
from xlane.engine.rpc_client import RpcClient

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

ROOT = Path(__file__).resolve().parents[2]
PAGE = 32


def make_request(
    number: int = 0, *, prompt: tuple[int, ...] = (1, 2), max_tokens: int = 6, **rest
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=number, temperature=float(number % 2))
    return Request(id=f"r{number}", prompt_ids=prompt, sampling=sampling, **rest)


async def collect(client: Replicas | ReplayingClient, request: Request) -> list[StepOutput]:
    return [output async for output in client.submit(request)]


def ids_of(outputs: list[StepOutput]) -> list[int]:
    return [token.id for output in outputs for token in output.tokens]


class Near(LocalClient):
    """An engine in this process, asked as one elsewhere is. `reached` is whether it answers."""

    def __init__(self, core: FakeCore) -> None:
        super().__init__(core)
        self.core, self.reached, self.closed = core, True, False
        self.asked: list[Request] = []

    async def serving(self) -> bool:
        if not self.reached:
            raise EngineLost("nobody listens", blameless=True)
        return await self.health()

    def cancel_all(self) -> None:
        for request in self.asked:
            self.core.cancel(request.id)

    async def submit(self, request: Request):
        self.asked.append(request)
        await self.serving()
        async with aclosing(super().submit(request)) as outputs:
            async for output in outputs:
                yield output

    async def close(self) -> None:
        self.closed = True
        await super().close()


Rig = tuple[Replicas, Fleet, dict[str, Near]]


@asynccontextmanager
async def near(*addresses: str, kind: type[Near] = Near, **cores: FakeCore) -> AsyncIterator[Rig]:
    """Engines in this process, by the names of `cores`; `addresses` default to those."""
    engines = {name: kind(core) for name, core in cores.items()}
    fleet = Fleet(addresses or tuple(cores), "fake", connect=engines.__getitem__, look_s=0.005)
    client = Replicas(fleet)
    try:
        async with asyncio.timeout(20):
            await fleet.start()
            for name in () if addresses else cores:
                while (replica := fleet.at(name)) is None or replica.info is None:
                    await asyncio.sleep(0.001)
            yield client, fleet, engines
    finally:
        await client.close()
        for core in cores.values():
            core.stop()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def counts(engines: dict[str, Near]) -> dict[str, int]:
    return {name: len(engine.asked) for name, engine in engines.items()}


async def test_the_least_busy_engine_gets_the_next_one():
    async with near(a=FakeCore(lanes=2), b=FakeCore(lanes=4), c=FakeCore(lanes=4)) as (client, _, engines):
        for engine in engines.values():
            engine.core.freeze()
        running = [
            asyncio.ensure_future(collect(client, make_request(n, prompt=(n + 1,)))) for n in range(10)
        ]
        await asyncio.sleep(0)
        await until(lambda: sum(counts(engines).values()) == 10)
        assert counts(engines) == {"a": 2, "b": 4, "c": 4}  # by lanes, not by heads
        for engine in engines.values():
            engine.core.freeze(False)
        streams = await asyncio.gather(*running)
    assert [ids_of(stream) for stream in streams] == [
        expected_ids(make_request(n, prompt=(n + 1,))) for n in range(10)
    ]


async def test_what_other_fronts_have_there_counts():
    busy = FakeCore(lanes=2)
    busy.freeze()
    other = LocalClient(busy)
    theirs = [asyncio.ensure_future(collect(other, make_request(90 + n))) for n in range(2)]  # type: ignore[arg-type]
    async with near(a=busy, b=FakeCore(lanes=2)) as (client, _, engines):
        for n in range(3):
            await collect(client, make_request(n, prompt=(n + 1,)))
        assert counts(engines) == {"a": 0, "b": 3}
        busy.freeze(False)
        await asyncio.gather(*theirs)


async def test_a_beginning_goes_where_it_was_unless_that_one_is_notably_busier():
    instructions = tuple(range(PAGE))
    async with near(a=FakeCore(), b=FakeCore()) as (client, _, engines):
        for n in range(6):  # one after the other, and in turns with prompts that begin otherwise
            await collect(client, make_request(n, prompt=(*instructions, n)))
            await collect(client, make_request(100 + n, prompt=(n + 1, *instructions)))
        owner = next(name for name, e in engines.items() if e.asked[0].prompt_ids[:PAGE] == instructions)
        alike = [r for r in engines[owner].asked if r.prompt_ids[:PAGE] == instructions]
        assert len(alike) == 6
        # A longer beginning that the other one has goes before the shorter one.
        deeper = (*instructions, *range(100, 100 + 3 * PAGE))
        for engine in engines.values():
            engine.core.freeze()
        many = [
            asyncio.ensure_future(collect(client, make_request(200 + n, prompt=(*deeper, n))))
            for n in range(8)
        ]
        other = ({*engines} - {owner}).pop()
        await until(lambda: sum(counts(engines).values()) == 20)
        spread = {
            name: sum(r.prompt_ids[: len(deeper)] == deeper for r in e.asked) for name, e in engines.items()
        }
        assert spread[owner] == 4  # three, of eight lanes, would be more than two and a share of the pool
        assert spread[other] == 4
        for engine in engines.values():
            engine.core.freeze(False)
        await asyncio.gather(*many)


async def test_adapters_and_salts_have_beginnings_of_their_own():
    prompt = tuple(range(PAGE))
    async with near(a=FakeCore(), b=FakeCore()) as (client, _, engines):
        for n, salt in enumerate(("", "x", "", "x")):
            await collect(client, make_request(n, prompt=prompt, cache_salt=salt))
        assert [[r.cache_salt for r in e.asked] for e in engines.values()] in (
            [["", ""], ["x", "x"]],
            [["x", "x"], ["", ""]],
        )


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({"model_id": "other"}, "it serves other, and this front fake"),
        ({"max_total_tokens": 99}, "its max_total_tokens is 99, and was 4096"),
        ({"model_sha": "abc"}, "its model_sha is 'abc', and was None"),
    ],
)
async def test_an_engine_that_serves_something_else_is_named_and_not_used(
    says: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
):
    async with near(a=FakeCore(), b=FakeCore(**says)) as (client, fleet, engines):
        await until(lambda: fleet.states["refused"] == 1)
        for n in range(3):
            await collect(client, make_request(n))
        assert counts(engines) == {"a": 3, "b": 0}
        assert (await client.info()).lanes == (await client.stats()).lanes_active + 8
    (line,) = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert line.startswith(f"engine b is refused: {why}")


async def test_an_engine_that_drains_gets_no_more_and_finishes_what_it_has():
    async with near(a=FakeCore(turn_s=0.002), b=FakeCore()) as (client, fleet, engines):
        engines["b"].reached = False
        await until(lambda: fleet.states["away"] == 1)
        long = asyncio.ensure_future(collect(client, make_request(1, max_tokens=100)))
        await until(lambda: engines["a"].asked)
        engines["b"].reached = True
        draining = asyncio.ensure_future(asyncio.to_thread(engines["a"].core.drain, 30))
        # Even before it is seen: what it refuses goes to the next one.
        await until(lambda: not engines["a"].core.healthy() and fleet.states["away"] == 0)
        assert ids_of(await collect(client, make_request(2))) == expected_ids(make_request(2))
        assert ids_of(await long) == expected_ids(make_request(1, max_tokens=100))
        assert fleet.states == {"serving": 1, "draining": 1, "away": 0, "refused": 0}
        await draining


async def test_what_an_engine_ends_before_it_is_done_goes_on_elsewhere():
    async with near(a=FakeCore(turn_s=0.002), b=FakeCore()) as (inner, _, engines):
        client, request = ReplayingClient(inner), make_request(3, max_tokens=300)
        running = asyncio.ensure_future(collect(client, request))
        await until(
            lambda: engines["a"].core.stats().decode_tokens + engines["b"].core.stats().decode_tokens > 5
        )
        (first,) = [engine for engine in engines.values() if engine.asked]
        await asyncio.to_thread(first.core.drain, 0)
        outputs = await running
        assert ids_of(outputs) == expected_ids(request)
        assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.LENGTH]
        assert client.replays == 1
        assert sorted(counts(engines).values()) == [1, 1]


async def test_a_full_engine_is_not_the_last_word():
    async with near(a=FakeCore(lanes=1, max_queued=0), b=FakeCore(lanes=1, max_queued=0)) as (
        client,
        _,
        engines,
    ):
        for engine in engines.values():
            engine.core.freeze()
        prompt = tuple(range(PAGE))
        running = [asyncio.ensure_future(collect(client, make_request(n, prompt=prompt))) for n in range(2)]
        await until(lambda: [len(e.core._requests) for e in engines.values()] == [1, 1])
        with pytest.raises(Overloaded):
            await collect(client, make_request(2, prompt=prompt))
        for engine in engines.values():
            engine.core.freeze(False)
        await asyncio.gather(*running)


async def test_with_nobody_left_a_request_waits_as_for_one_engine():
    async with near(a=FakeCore(), b=FakeCore()) as (inner, fleet, engines):
        client = ReplayingClient(inner, recovery_timeout_s=20)
        for engine in engines.values():
            engine.reached = False
        waiting = asyncio.ensure_future(collect(client, make_request()))
        await until(lambda: fleet.states["away"] == 2)
        assert not await client.health()
        with pytest.raises(EngineLost, match="a is away: nobody listens, b is away"):
            await collect(inner, make_request(1))
        with pytest.raises(EngineLost, match="a is away"):
            await client.stats()
        assert not waiting.done()
        engines["b"].reached = True
        assert ids_of(await waiting) == expected_ids(make_request())


async def test_draining_ends_our_requests_and_no_engine():
    core = FakeCore(turn_s=0.002)
    async with near(a=core) as (client, _, engines):
        running = asyncio.ensure_future(collect(client, make_request(max_tokens=3000)))
        await until(lambda: core.stats().decode_tokens > 2)
        await client.drain(0)
        outputs = await running
        assert outputs[-1].finish_reason is FinishReason.ABORT
        with pytest.raises(EngineStopped):
            await collect(client, make_request(1))
        assert core.healthy()
    assert engines["a"].closed


async def test_a_name_is_resolved_again_and_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    answers: list[set[str] | OSError] = [OSError("nobody is ready"), {"a", "b"}]

    async def look_up(name: str) -> set[str]:
        assert name == "dns:///engines:9000"
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(fleet_module, "resolve", look_up)
    a, b, c = (FakeCore(turn_s=0.002) for _ in range(3))
    async with near("dns:///engines:9000", a=a, b=b, c=c) as (client, fleet, engines):
        await until(lambda: fleet.states["serving"] == 2)
        engines["b"].reached = False
        await until(lambda: fleet.states["away"] == 1)
        long = asyncio.ensure_future(collect(client, make_request(1, max_tokens=150)))
        await until(lambda: len(engines["a"].asked) == 1)
        answers[:] = [{"c"}]
        await until(lambda: fleet.at("c") is not None and fleet.at("b") is None)
        assert engines["b"].closed
        await until(lambda: fleet.states["serving"] == 2)
        assert ids_of(await collect(client, make_request(2))) == expected_ids(make_request(2))
        assert len(engines["c"].asked) == 1  # a is not in the name any more, and only ends what it has
        assert fleet.at("a") is not None
        assert ids_of(await long) == expected_ids(make_request(1, max_tokens=150))
        await until(lambda: fleet.at("a") is None)
        stats = await client.stats()
        assert (stats.decode_tokens, stats.prefill_tokens) == (156, 4)  # a's, which is gone, too
        answers[:] = [OSError("no name server")]
        await until(lambda: sum("cannot be resolved" in r.getMessage() for r in caplog.records) == 2)
        assert [replica.address for replica in fleet.all] == ["c"]


class Counting(Near):
    looks = 0

    async def serving(self) -> bool:
        self.looks += 1
        return await super().serving()


async def test_a_survey_asks_each_engine_once():
    engines = {name: Counting(FakeCore()) for name in "ab"}
    fleet = Fleet(tuple(engines), "fake", connect=engines.__getitem__)
    await fleet.survey()
    assert [(replica.told, engines[replica.address].looks) for replica in fleet.all] == [("serving", 1)] * 2
    await fleet.close()
    for engine in engines.values():
        engine.core.stop()


async def test_where_nothing_changed_nobody_is_told(monkeypatch: pytest.MonkeyPatch):
    core, asked, told = FakeCore(), [], []

    async def look_up(name: str) -> set[str]:
        asked.append(name)
        return {"a"}

    monkeypatch.setattr(fleet_module, "resolve", look_up)
    fleet = Fleet(
        ["dns:///engines:9000"], "fake", on_change=lambda: told.append(fleet.states["serving"]),
        connect=lambda address: Near(core), look_s=0.001,
    )  # fmt: skip
    await fleet.start()
    assert told[-1] == 1
    known, seen = len(asked), len(told)
    await until(lambda: len(asked) > known + 5)
    assert len(told) == seen
    await fleet.close()
    core.stop()


class Mortal(Near):
    """Simulates an engine that dies, with all that runs in it, when a request with KILL_TOKEN gets to its third token; the
    next one is there at once. Times are random."""

    deaths = 0
    chance = random.Random(0)

    async def submit(self, request: Request):
        life = self.deaths
        self.asked.append(request)
        for position in range(len(request.resume_ids), request.sampling.max_tokens):
            await asyncio.sleep(self.chance.choice([0, 0, 0.001]))
            if life == self.deaths and KILL_TOKEN in request.prompt_ids:
                self.deaths += position + self.chance.randrange(3) >= 2
            if life != self.deaths:
                raise EngineLost("killed")
            last = position + 1 == request.sampling.max_tokens
            yield StepOutput(
                request.id, (token_at(request, position),), FinishReason.LENGTH if last else None
            )


async def test_one_request_that_kills_engine_after_engine_is_found_and_no_bystander_is_blamed():
    async with near(kind=Mortal, a=FakeCore(), b=FakeCore(), c=FakeCore()) as (inner, _, engines):
        for seed in range(10):
            Mortal.chance.seed(seed)
            before = sum(engine.deaths for engine in engines.values())  # type: ignore[attr-defined]
            client = ReplayingClient(inner, max_losses=50)
            good = [make_request(n, max_tokens=20, prompt=(n + 1,)) for n in range(9)]
            bad = make_request(99, max_tokens=20, prompt=(KILL_TOKEN,))
            *streams, end = await asyncio.gather(
                *(collect(client, request) for request in [*good, bad]), return_exceptions=True
            )
            for request, outputs in zip(good, streams, strict=True):
                assert not isinstance(outputs, BaseException), seed
                assert ids_of(outputs) == expected_ids(request)
            assert isinstance(end, RequestFailed)
            deaths = sum(engine.deaths for engine in engines.values()) - before  # type: ignore[attr-defined]
            assert 4 <= deaths <= 10, seed


async def test_a_name_has_all_its_addresses():
    assert "127.0.0.1:81" in await resolve("dns:///localhost:81")
    with pytest.raises(socket.gaierror):
        await resolve("dns:///no.such.name.invalid:81")


@pytest.mark.parametrize(
    "good", ["unix:/run/x", "tpu-1:9000", "10.0.0.1:1", "[::1]:65535", "dns:///engines:9000"]
)
async def test_addresses(good: str):
    check_address(good)


@pytest.mark.parametrize(
    "bad",
    ["", "tpu-1", "unix:x", "tpu-1:0", "tpu-1:x", "::1:90", "dns:///x", "dns://8.8.8.8/x:1", "http://a:1"],
)
async def test_no_addresses(bad: str):
    with pytest.raises(ValueError, match="expected unix:/PATH, HOST:PORT or dns:///NAME:PORT"):
        check_address(bad)


@asynccontextmanager
async def processes(count: int, drain_s: float) -> AsyncIterator[list[Supervisor]]:
    """Engine processes, each of which is started again when it ends."""
    supervisors = [
        Supervisor(
            [sys.executable, "-m", "tests.support.fake_core", "--turn-s=0.004", f"--drain-s={drain_s}"],
            policy=RestartPolicy(first_delay_s=0.01),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(count)
    ]
    try:
        await asyncio.gather(*(supervisor.start() for supervisor in supervisors))
        yield supervisors
    finally:
        await asyncio.gather(*(supervisor.stop(5) for supervisor in supervisors))


async def replaced(supervisor: Supervisor, number: signal.Signals) -> str:
    """Signal an engine; how it ended, when the next one is ready."""
    already = len(supervisor.events)
    assert supervisor.pid is not None
    os.kill(supervisor.pid, number)
    await until(lambda: supervisor.events[-1].kind == "ready" and len(supervisor.events) > already)
    return supervisor.events[already].detail


async def test_engines_restarted_one_after_another_under_load_cost_no_token():
    async with processes(3, drain_s=0.3) as supervisors:
        fleet = Fleet(
            [supervisor.address for supervisor in supervisors], "fake", connect=RpcClient, look_s=0.05
        )
        client = ReplayingClient(Replicas(fleet), recovery_timeout_s=30)
        ended: list[Request] = []
        rolling = True

        async def load(number: int) -> None:
            """Greedy, seeded and guided streams, short and long, one after another."""
            while rolling:
                number += 100
                grammar = "start: /.*/" if number % 3 == 0 else None
                request = make_request(
                    number, prompt=(number % 50, 2), max_tokens=10 + number % 7 * 40, grammar=grammar
                )
                outputs = await collect(client, request)
                assert ids_of(outputs) == expected_ids(request)
                assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.LENGTH]
                ended.append(request)

        try:
            await fleet.start()
            loads = [asyncio.ensure_future(load(n)) for n in range(12)]
            endings = []
            for supervisor in supervisors:
                endings.append(await replaced(supervisor, signal.SIGTERM))
                await until(lambda: fleet.states["serving"] == 3)
            endings.append(await replaced(supervisors[0], signal.SIGKILL))
            await until(lambda: fleet.states["serving"] == 3)
            rolling = False
            await asyncio.gather(*loads)
            stats = await client.stats()
        finally:
            await client.close()
    assert [ending.split(":")[0] for ending in endings] == ["exit code 0"] * 3 + ["killed by SIGKILL"]
    assert client.replays > 0
    assert len(ended) >= 12
    # Counted on over all processes. What is computed twice, or in the last second of a killed one, is not the same.
    assert stats.decode_tokens > 0.5 * sum(len(expected_ids(request)) for request in ended)
