"""Requests with adapters and without in one batch, and adapters that come and go meanwhile, against transformers with merged
weights."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.engine.conftest import ids, request, run
from tests.support.few_programs import few_programs
from tests.support.lora import changed, lora
from tests.support.tiny import hf_greedy, tiny_model
from xlane.engine import EngineConfig, InvalidRequest, PlanError
from xlane.engine.engine import Engine
from xlane.engine.local import LocalClient
from xlane.engine.opening import open_served

PROMPT = np.random.default_rng(5).integers(3, 131, 21).tolist()
KIND = "llama-gqa-tied"
NAMED = ("all", "few")
"""At the start; one more has a place."""
LONG = 100
OTHERS = (*NAMED, "")
UP = "base_model.model.model.layers.0.mlp.up_proj."


@pytest.fixture(scope="module")
def paths(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By name: adapter and merged checkpoint. They differ in rank and in what they change."""
    plain, to = tiny_model(KIND, models), tmp_path_factory.mktemp("lora")
    return {
        "all": lora(plain, to, 4, "proj", seed=1),
        "few": lora(plain, to, 2, r"layers\.1.*(q_proj|down_proj)", seed=2),
        "late": lora(plain, to, 8, r"layers\.0.*(k_proj|gate_proj)", seed=3),
        "other": lora(plain, to, 1, "o_proj|up_proj", seed=4),
    }


@pytest.fixture(scope="module")
def want(paths, models: Path) -> dict[str, list[int]]:
    """By name what each answers, and what the model does without."""
    by_name = {name: merged for name, (_, merged) in paths.items()} | {"": tiny_model(KIND, models)}
    answers = {name: hf_greedy(path, PROMPT, 8) for name, path in by_name.items()}
    assert len({tuple(answer) for answer in answers.values()}) == len(answers)
    return answers


@pytest.fixture(scope="module")
def engine(models: Path, paths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config = EngineConfig(
        model_id=KIND, lanes=4, page_tokens=4, max_total_tokens=128, prefill_chunk_tokens=16,
        cache_dir=str(tmp_path_factory.getbasetemp().parent / "kernels"),
        lora_adapters=(*(f"{name}={paths[name][0]}" for name in NAMED), "slots=1", "rank=8"),
    )  # fmt: skip
    opened = open_served(config, tiny_model(KIND, models))
    with few_programs():
        engine = Engine.build(config, opened.config, opened.source)
    yield engine
    engine.stop()


def test_each_request_of_a_batch_has_its_own(engine: Engine, want: dict[str, list[int]]) -> None:
    assert engine.info.adapters == NAMED
    asked = [replace(request(PROMPT), adapter=name) for name in ("few", "", "all", "few")]
    got = [ids(outputs) for outputs in run(engine, *asked)]
    assert got == [want[one.adapter] for one in asked]
    assert engine.stats().compiles_after_ready == 0


def test_pages_are_shared_under_the_same_adapter_only(engine: Engine) -> None:
    mine = replace(request(PROMPT), cache_salt="shared", adapter="all")
    (first,) = run(engine, mine)
    for asked, found in (
        (mine, True),
        (replace(mine, adapter="few"), False),
        (replace(mine, adapter=""), False),
    ):
        (outputs,) = run(engine, replace(asked, id=request(PROMPT).id))
        assert (outputs[0].cached_tokens > 0) == found
    assert first[0].cached_tokens == 0


def test_an_adapter_that_is_not_there_is_refused_by_name(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"no adapter 'more' here \(--lora-adapters\): all, few"):
        run(engine, replace(request(PROMPT), adapter="more"))


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What is compiled during a test, on any thread."""
    heard: list[str] = []

    def listen(event: str, duration_secs: float, **said: Any) -> None:
        if "backend_compile" in event:
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield heard
    jax.monitoring.unregister_event_duration_listener(listen)


def test_adapters_come_and_go_beside_requests_that_do_not_notice(
    engine: Engine, paths, want: dict[str, list[int]], compiled: list[str]
) -> None:
    """The one free slot is filled, emptied and filled anew while all others are computed with, its own last user too."""
    alone = [run(engine, replace(request(PROMPT, max_tokens=LONG), adapter=name)) for name in OTHERS]

    async def check() -> None:
        client = LocalClient(engine)

        async def ask(name: str, seen: asyncio.Event | None = None, tokens: int = 8) -> list[int]:
            made: list[int] = []
            async for output in client.submit(
                replace(request(PROMPT, max_tokens=tokens), adapter=name, cache_salt="new")
            ):
                made += ids([output])
                if seen is not None:
                    seen.set()
            return made

        began = [asyncio.Event() for _ in range(3)]
        running = [asyncio.ensure_future(ask(name, seen, LONG)) for name, seen in zip(OTHERS, began)]
        await asyncio.gather(*(seen.wait() for seen in began))
        await client.load_adapter("more", str(paths["late"][0]))
        assert (await client.info()).adapters == (*NAMED, "more")
        assert await ask("more") == want["late"]
        last = asyncio.Event()
        user = asyncio.ensure_future(ask("more", last, LONG))
        await last.wait()
        await client.unload_adapter("more")
        with pytest.raises(InvalidRequest, match="no adapter 'more'"):
            await ask("more")
        with pytest.raises(InvalidRequest, match="no slot is free for the adapter 'more': 2 of 3 have"):
            await client.load_adapter("more", str(paths["other"][0]))
        assert (await user)[:8] == want["late"]
        await client.load_adapter("more", str(paths["other"][0]))
        assert await ask("more") == want["other"]  # and finds no pages of the one before
        assert await asyncio.gather(*running) == [ids(outputs) for (outputs,) in alone]
        with pytest.raises(
            InvalidRequest, match=r"no slot is free .* 3 of 3 .* unload another, or keep more"
        ):
            await client.load_adapter("most", str(paths["late"][0]))
        await client.unload_adapter("more")

    asyncio.run(check())
    assert not compiled


def test_a_loaded_adapter_is_told_from_another_of_its_name(engine: Engine, paths) -> None:
    folder = str(paths["other"][0])
    digest = engine.load_adapter("more", folder)
    assert engine.load_adapter("more", "/gone", digest) == digest  # it is there: nothing is read
    with pytest.raises(InvalidRequest, match="is another one than 'more' was"):
        engine.load_adapter("more", str(paths["late"][0]), digest + "?")
    engine.unload_adapter("more")
    with pytest.raises(InvalidRequest, match="no adapter 'more'"):
        engine.unload_adapter("more")


@pytest.mark.parametrize(
    ("change", "said", "problem"),
    [
        (None, {}, r"adapter_config\.json is missing"),
        ({}, {"r": 9}, r"rank 9, and its slot holds 8 \(--lora-adapters rank=N\)"),
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": (1, 64)}, {}, "layers.9.* changes nothing"),
        ({UP + "lora_B.weight": (7, 1)}, {}, r"lora_B.weight is \(7, 1\), expected \(96, 1\)"),
        ({UP + "lora_A.weight": (1, 64)}, {}, "not finite"),
    ],
    ids=["no folder", "rank", "another model", "another width", "not finite"],
)  # fmt: skip
def test_what_fits_no_slot_is_refused_and_changes_nothing(
    change: dict[str, tuple[int, ...]] | None,
    said: dict[str, Any],
    problem: str,
    engine: Engine,
    paths,
    want: dict[str, list[int]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "bad"
    if change is not None:
        new = {name: np.full(shape, np.nan, np.float32) for name, shape in change.items()}
        changed(paths["other"][0], folder, lambda tensors: tensors.update(new), **said)
    with pytest.raises(InvalidRequest, match=f"'bad' cannot be loaded: .*{problem}"):
        engine.load_adapter("bad", str(folder))
    assert engine.info.adapters == NAMED
    (outputs,) = run(engine, replace(request(PROMPT), adapter="few"))
    assert ids(outputs) == want["few"]


@pytest.mark.parametrize("said", [("slots=0",), ("slots=./folder",), ("rank=1025", "slots=1")])
def test_places_that_cannot_be_are_refused(said: tuple[str, ...], models: Path) -> None:
    config = EngineConfig(model_id=KIND, lora_adapters=said)
    with pytest.raises(PlanError, match=f"--lora-adapters {said[0]}: expected a whole number from 1 to"):
        open_served(config, tiny_model(KIND, models))


@pytest.mark.parametrize("said", [("slots=2", "slots=3"), ("rank=8", "slots=1", "rank=8")])
def test_places_said_twice_are_refused(said: tuple[str, ...], models: Path) -> None:
    with pytest.raises(PlanError, match=r"(slots=2, slots=3|rank=8, rank=8): \w+ is said 2 times"):
        open_served(EngineConfig(model_id=KIND, lora_adapters=said), tiny_model(KIND, models))


def test_a_rank_without_places_is_refused(models: Path) -> None:
    with pytest.raises(PlanError, match="say slots=N too"):
        open_served(EngineConfig(model_id=KIND, lora_adapters=("rank=8",)), tiny_model(KIND, models))
