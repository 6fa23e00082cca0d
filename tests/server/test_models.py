"""Several models on one port, over engines of hand arithmetic: who answers, who leaves, who waits, what fails alone."""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from xlane.engine import EngineConfig, EngineInfo, EngineLost, PlanError
from xlane.server import NotReady, UsageError, models, stream
from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.console import Console
from xlane.server.entry import Entry
from xlane.server.errors import Busy, NoSuchModel
from xlane.server.flags import RunConfig
from xlane.server.models import Models, ServedModel
from xlane.server.several import several

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine, fake_info


@dataclass
class Loaded:
    """In the place of a `LoadedModel`."""

    stand: "Stand"
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    async def load(self) -> EngineInfo:
        self.stand.events.append("load")
        for word in self.stand.saying:
            self.stand.backend.say(word)
            while self.stand.heard[word] < 2:  # asked for how long to wait, and for what to tell
                await asyncio.sleep(0.001)
        await self.stand.gate.wait()
        if self.stand.fails is not None:
            raise self.stand.fails
        info = self.stand.engine.info_value
        self.stand.backend.ready(self.stand.engine, ByteTokenizer(), info)
        return info

    async def wait(self) -> None:
        await self.lost.wait()
        raise EngineLost("it died 5 times in a row")

    async def unload(self, timeout_s: float = 10.0, hurry: asyncio.Event | None = None) -> None:
        self.stand.events.append("unload")


class Stand:
    """One model of the tests, and what is done with it."""

    def __init__(self, name: str) -> None:
        self.backend, self.gate = Backend(), asyncio.Event()
        self.engine = FakeEngine(replace(fake_info(), model_id=name))
        self.fails: Exception | None = None
        self.events: list[str] = []
        self.saying: list[str] = []
        """How far it is, while it loads: each until a stream has told of it."""
        self.heard = Counter[str]()
        self.held: Loaded | None = None
        self.gate.set()
        self.served = ServedModel(name, self.backend, self._make)

    def _make(self) -> Loaded:
        self.held = Loaded(self)
        return self.held


@dataclass
class Several:
    """A front over three models, `a` loaded."""

    client: TestClient
    models: Models
    stands: dict[str, Stand]

    def ask(self, model: str | None, **fields: Any) -> Any:
        body = {"prompt": "a", "max_tokens": 3, "temperature": 0, "model": model, **fields}
        return self.client.post("/v1/completions", json=body)

    def states(self) -> list[str]:
        return [model["state"] for model in self.client.get("/v1/models").json()["data"]]


def made(
    most: int = 1, wait_s: float = 5.0, waiting: int = 9, turn_s: float = 60.0
) -> tuple[Models, dict[str, Stand]]:
    stands = {name: Stand(name) for name in "abc"}
    served = [stand.served for stand in stands.values()]
    for model in served[1:]:
        model.backend.down(models.UNASKED, comes_back=True)
    return Models(served, most_loaded=most, most_waiting=waiting, wait_s=wait_s, turn_s=turn_s), stands


@pytest.fixture
def front(request: pytest.FixtureRequest) -> Iterator[Several]:
    models, stands = made(*getattr(request, "param", ()))
    app = create_app(stands["a"].backend, ServerConfig(), models)
    with TestClient(app, raise_server_exceptions=False) as client:
        client.portal.call(models.load)  # type: ignore[union-attr]
        yield Several(client, models, stands)
        client.portal.call(models.unload, 0.0)  # type: ignore[union-attr]


def test_the_model_of_a_request_answers_it(front: Several):
    for name in ("b", "a", "c", "a"):
        answer = front.ask(name)
        assert (answer.json()["choices"][0]["text"], answer.json()["model"]) == ("bcd", name)
    assert [len(stand.engine.submitted) for stand in front.stands.values()] == [2, 1, 1]
    chat = {"model": "b", "messages": [{"role": "user", "content": "q"}], "max_tokens": 2}
    assert front.client.post("/v1/chat/completions", json=chat).json()["model"] == "b"
    message = front.client.post("/v1/messages", json=chat).json()
    response = {"model": "b", "input": "q", "max_output_tokens": 2}
    assert (message["model"], front.client.post("/v1/responses", json=response).json()["model"]) == ("b", "b")
    assert len(front.stands["b"].engine.submitted) == 4


def test_who_names_none_asks_the_first_as_tgis_routes_do(front: Several):
    front.ask("b")
    assert front.ask(None).json()["model"] == "a"
    front.ask("b")
    assert front.client.post(
        "/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 2}}
    ).json() == {"generated_text": "yz"}
    assert len(front.stands["a"].engine.submitted) == 2
    front.ask("b")
    assert front.client.get("/info").json()["model_id"] == "a", "it is known, and need not be loaded for that"
    assert front.states() == ["not loaded", "loaded", "not loaded"]


def test_an_unknown_model_is_404_and_moves_nobody(front: Several):
    answer = front.ask("gpt-4")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "this server has 'a', 'b', 'c'" in answer.json()["error"]["message"]
    assert front.client.get("/v1/models/gpt-4").status_code == 404
    assert front.states() == ["loaded", "not loaded", "not loaded"]


@pytest.mark.parametrize("front", [(2,)], indirect=True)
def test_the_one_not_used_the_longest_leaves(front: Several):
    front.ask("b")
    front.ask("a")
    assert front.states() == ["loaded", "loaded", "not loaded"]
    front.ask("c")
    assert front.states() == ["loaded", "not loaded", "loaded"]
    assert front.stands["b"].events == ["load", "unload"]
    shown = front.client.get("/v1/models/b").json()
    assert (shown["id"], shown["state"], shown["max_model_len"]) == ("b", "not loaded", None)
    assert front.client.get("/v1/models/c").json()["max_model_len"] == fake_info().max_total_tokens


def test_a_stream_uses_its_model_to_its_last_byte(front: Several):
    seen: list[int] = []
    a = front.stands["a"]
    with front.client.stream(
        "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 5, "stream": True}
    ) as answer:
        for _ in answer.iter_lines():
            seen.append(a.served.running)
    assert front.ask("b").status_code == 200
    assert a.served.running == 0
    assert a.events == ["load", "unload"]


def test_the_lanes_of_a_model_are_asked_for_by_its_name(front: Several):
    def lanes(name: str) -> Any:
        return front.client.get("/ui/lanes", params={"model": name})

    front.ask("b")
    assert lanes("b").json()["model"] == "b"
    away = lanes("a")
    assert (away.status_code, away.json()["error"]) == (503, f"The model is not loaded: {models.UNASKED}")
    assert lanes("d").status_code == 404


def test_one_of_several_that_is_away_is_well(front: Several):
    front.ask("b")
    assert front.client.get("/health").status_code == 200
    front.stands["b"].engine.healthy = False
    assert front.client.get("/health").json()["error"] == "unhealthy"
    front.models.drain()
    assert front.client.get("/health").json()["error"] == "shutting down"
    assert front.ask("a").status_code == 503


@pytest.mark.parametrize("front", [(2,)], indirect=True)
def test_metrics_tell_the_model(front: Several):
    front.ask("b")
    front.ask("b")
    text = front.client.get("/metrics").text
    count = dict(re.findall(r'^tgi_request_count\{model="(.)"\} (\S+)$', text, re.MULTILINE))
    assert count == {"a": "0.0", "b": "2.0", "c": "0.0"}
    assert dict(re.findall(r'^xlane_ready\{model="(.)"\} (\S+)$', text, re.MULTILINE)) == {
        "a": "1.0",
        "b": "1.0",
        "c": "0.0",
    }
    assert text.count("# TYPE tgi_request_duration histogram") == 1
    assert re.search(r'tgi_request_failure\{err="overloaded",model="c"\} 0.0', text)


@pytest.fixture
def listening(front: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams tell often, and a model notices."""
    tell = Entry.told

    def told(entry: Entry) -> bytes | None:
        if comment := tell(entry):
            for stand in front.stands.values():
                stand.heard.update(word for word in stand.saying if word in comment.decode())
        return comment

    monkeypatch.setattr(Entry, "told", told)
    monkeypatch.setattr(stream, "TELL_S", 0.001)


STREAMS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 3, "temperature": 0},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "q"}], "max_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "q"}], "max_tokens": 3},
    "/v1/responses": {"input": "q", "max_output_tokens": 3},
}


@pytest.mark.parametrize("front", [(1, 0.02)], indirect=True)
@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_is_told_how_far_its_model_is(front: Several, path: str, listening: None):
    front.stands["b"].saying = ["weights 40 %", "programs 3 %"]
    body = {**STREAMS[path], "model": "b", "stream": True}
    answer, quiet = front.client.post(path, json=body), front.client.post(path, json=body)
    assert answer.status_code == 200
    told = [line for line in answer.text.split("\n\n") if line.startswith(":")]
    assert list(dict.fromkeys(told)) == [f": loading b: {word}" for word in ("weights 40 %", "programs 3 %")]
    assert answer.text.startswith(told[0]), "before anything else"
    assert [line[:20] for line in answer.text.split("\n\n")[len(told) :]] == [line[:20] for line in quiet.text.split("\n\n")]  # fmt: skip


@pytest.mark.parametrize("front", [(1, 0.02)], indirect=True)
def test_a_stream_whose_model_cannot_be_loaded_ends_with_that(front: Several, listening: None):
    b = front.stands["b"]
    b.fails, b.saying = PlanError("weights need 5 GB of 1 GB"), ["weights 1 %"]
    told, failed = front.ask("b", stream=True).text, front.ask("b", stream=True)
    assert told.startswith(": loading b: ")
    assert "'b' cannot be loaded: weights need 5 GB" in told
    assert failed.status_code == 503, "it is known already, and nothing was said yet"


@pytest.mark.parametrize("front", [(1, 0.02)], indirect=True)
def test_who_waits_too_long_is_told_to_come_back(front: Several):
    b = front.stands["b"]
    front.client.portal.call(_do, b.gate.clear)  # type: ignore[union-attr]
    answer = front.ask("b")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "'b' is not loaded yet" in answer.json()["error"]["message"]
    assert front.states() == ["not loaded", "loading", "not loaded"]
    front.client.portal.call(_do, b.gate.set)  # type: ignore[union-attr]
    assert front.ask("b").status_code == 200
    assert b.events == ["load"], "what one waiter began serves the next"


def test_a_model_that_cannot_be_loaded_says_why_and_others_go_on(
    front: Several, monkeypatch: pytest.MonkeyPatch
):
    b = front.stands["b"]
    b.fails = PlanError("weights need 5 GB of 1 GB")
    for _ in range(2):
        answer = front.ask("b")
        assert answer.status_code == 503
        assert 55 <= int(answer.headers["retry-after"]) <= 60
        assert "'b' cannot be loaded: weights need 5 GB of 1 GB" in answer.json()["error"]["message"]
    assert b.events == ["load", "unload"], "it is not tried for every request"
    assert front.ask("a").status_code == 200
    assert front.states() == ["loaded", "failed", "not loaded"]
    monkeypatch.setattr(models, "FAILURE_S", 0.0)
    b.fails = None
    assert front.ask("b").status_code == 200


@pytest.mark.parametrize("front", [(2,)], indirect=True)
def test_an_engine_that_is_lost_for_good_is_one_of_several(front: Several):
    front.ask("b")
    held = front.stands["b"].held
    assert held is not None
    front.client.portal.call(_do, held.lost.set)  # type: ignore[union-attr]
    assert "it died 5 times in a row" in front.ask("b").json()["error"]["message"]
    assert front.ask("a").status_code == 200
    assert front.client.get("/health").status_code == 200


async def _do(work: Callable[[], None]) -> None:
    work()
    await asyncio.sleep(0)


def alone(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 10))  # type: ignore[arg-type]

    run.__name__ = test.__name__
    return run


@alone
async def test_who_comes_while_the_first_starts_waits_for_that() -> None:
    """And has nothing loaded twice, nor makes the server ready before it is."""
    for most in (1, 2):
        several, stands = made(most)
        first = stands["a"]
        first.gate.clear()
        starting = asyncio.create_task(several.load())
        await asyncio.sleep(0)
        first.backend.say("weights")
        early = asyncio.create_task(several.enter(first.served))
        await asyncio.sleep(0.01)
        assert (first.backend.reason, first.backend.comes_back) == ("weights", False)
        first.gate.set()
        await asyncio.gather(starting, early)
        assert (first.events, first.served.running, [*first.served.tasks]) == (["load"], 1, ["watch"])
        await several.unload(0.0)


@alone
async def test_a_model_in_use_is_not_unloaded_and_who_wants_its_place_waits() -> None:
    models, stands = made()
    await models.load()
    a, b = models.find("a"), models.find("b")
    await models.enter(a)
    waiting = asyncio.create_task(models.enter(b))
    await some_turns()
    assert not waiting.done()
    assert b.why == "waits until another model is idle, or has had its turn"
    assert stands["a"].events == ["load"]
    models.release(a)
    await waiting
    assert stands["a"].events == ["load", "unload"]
    assert models.all["a"].state == "not loaded"


@alone
async def test_models_are_loaded_one_after_another_in_the_order_in_which_they_are_asked_for() -> None:
    models, stands = made()
    await models.load()
    order: list[str] = []

    async def use(name: str) -> None:
        await models.enter(models.find(name))
        order.append(name)
        models.release(models.all[name])

    await asyncio.gather(*(use(name) for name in ("b", "b", "c", "a", "b")))
    assert order == ["a", "b", "b", "b", "c"], "a is there until its place is needed"
    assert stands["b"].events == ["load", "unload"]
    with pytest.raises(NoSuchModel):
        models.find("d")
    await models.unload(0.0)
    assert [stands[name].events for name in "ac"] == [["load", "unload"]] * 2


@alone
async def test_only_so_many_wait_for_a_model() -> None:
    models, stands = made(waiting=2)
    await models.load()
    stands["b"].gate.clear()
    b = models.find("b")
    waiting = [asyncio.create_task(models.enter(b)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="2 requests wait for the model 'b' already"):
        await models.enter(b)
    stands["b"].gate.set()
    await asyncio.gather(*waiting)
    await models.enter(b)
    assert (b.running, b.waiting) == (3, 0), "of one that is loaded the permits decide"


@alone
async def test_a_model_that_is_always_in_use_has_its_turn_and_then_another_one() -> None:
    models, stands = made(turn_s=0.05)
    await models.load()
    a, b = models.find("a"), models.find("b")
    stop, came = asyncio.Event(), {"a": 0, "b": 0}

    async def always(model: ServedModel) -> None:
        """Two clients whose requests overlap, so that the model is never idle."""
        while not stop.is_set():
            await models.enter(model, patient=True)
            came[model.name] += 1
            await asyncio.sleep(0.004)
            models.release(model)

    clients = [asyncio.create_task(always(model)) for model in (a, a, b, b)]
    while len(stands["a"].events) < 5:  # loaded, gone, loaded, gone, loaded
        await asyncio.sleep(0.005)
    stop.set()
    await asyncio.gather(*clients)
    assert stands["b"].events[:3] == ["load", "unload", "load"][: len(stands["b"].events)]
    assert min(came.values()) > 10, "a turn is a turn, and not a request"


@alone
async def test_who_runs_in_a_model_that_leaves_is_not_cut_off_and_who_comes_then_waits() -> None:
    models, stands = made(turn_s=0.01)
    await models.load()
    a, b = models.find("a"), models.find("b")
    await models.enter(a)
    to_b = asyncio.create_task(models.enter(b))
    while a.state != "leaving":
        await asyncio.sleep(0.005)
    to_a = asyncio.create_task(models.enter(a))
    await some_turns()
    assert (to_a.done(), to_b.done(), stands["a"].events, a.backend.reason) == (False, False, ["load"], None)
    assert a.why.startswith("leaves for another model")
    models.release(a)
    await to_b
    assert (stands["a"].events, a.state) == (["load", "unload"], "loading")
    models.release(b)
    await to_a
    assert stands["b"].events == ["load", "unload"]


@alone
async def test_a_model_that_was_to_leave_stays_if_another_one_is_idle_first() -> None:
    models, stands = made(most=2, turn_s=0.01)
    await models.load()
    a, b, c = models.all.values()
    await models.enter(a)
    await models.enter(c)
    stands["b"].gate.clear()
    to_b = asyncio.create_task(models.enter(b))
    while a.state != "leaving":
        await asyncio.sleep(0.005)
    to_a = asyncio.create_task(models.enter(a))
    await some_turns()
    assert not to_a.done()
    models.release(c)
    await to_a
    assert (a.state, b.state, c.state) == ("loaded", "loading", "not loaded"), (
        "it does not wait for the other's loading"
    )
    stands["b"].gate.set()
    await to_b
    assert [stands[name].events for name in "abc"] == [["load"], ["load"], ["load", "unload"]]


@alone
async def test_a_stop_ends_the_waits_of_the_most_patient() -> None:
    models, stands = made(wait_s=0.01)
    await models.load()
    b = models.find("b")
    stands["b"].gate.clear()
    waiting = asyncio.create_task(models.enter(b, patient=True))
    await asyncio.sleep(0.05)
    assert not waiting.done(), "it is not bound by what whole answers wait"
    models.drain()
    await waiting
    with pytest.raises(NotReady, match="shutting down"):
        b.backend.serving()
    await models.unload(0.0)
    assert stands["b"].events == ["load", "unload"]


async def some_turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@alone
async def test_a_stop_while_a_model_is_loading_ends_its_engine() -> None:
    models, stands = made(wait_s=0.01)
    await models.load()
    stands["b"].gate.clear()
    with pytest.raises(NotReady):
        await models.enter(models.find("b"))
    await models.unload(0.0)
    assert stands["b"].events == ["load", "unload"]


def options(**server: Any) -> Models:
    config = ServerConfig(**server)
    return several(EngineConfig(model_id="o/first"), config, RunConfig(), Backend(), Console())


def test_models_are_named_by_the_option():
    found = options(more_models=("o/second", "small=./folder"), loaded_models=5)
    assert list(found.all) == ["o/first", "o/second", "small"]
    configs = [model.make.args[0] for model in found.all.values()]  # type: ignore[attr-defined]
    assert [config.model_id for config in configs] == ["o/first", "o/second", "./folder"]
    assert [config.memory_fraction for config in configs] == [pytest.approx(0.9 / 3)] * 3
    with pytest.raises(UsageError, match="there are two models o/first"):
        options(more_models=("o/first",))
    with pytest.raises(UsageError, match="--tokenizer-config-path=x is of one model"):
        options(more_models=("b",), tokenizer_config_path="x")
