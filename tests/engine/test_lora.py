"""Requests with adapters and without in one batch, against transformers with merged weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.conftest import ids, request, run
from tests.support.lora import lora
from tests.support.tiny import hf_greedy, tiny_model
from xlane.engine import EngineConfig, InvalidRequest
from xlane.engine.engine import Engine
from xlane.models.opened import open_model

PROMPT = np.random.default_rng(5).integers(3, 131, 21).tolist()
KIND = "llama-gqa-tied"


@pytest.fixture(scope="module")
def paths(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By name: adapter and merged checkpoint. They differ in rank and in what they change."""
    plain, to = tiny_model(KIND, models), tmp_path_factory.mktemp("lora")
    return {
        "all": lora(plain, to, 4, "proj", seed=1),
        "few": lora(plain, to, 2, r"layers\.1.*(q_proj|down_proj)", seed=2),
    }


@pytest.fixture(scope="module")
def engine(models: Path, paths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config = EngineConfig(
        model_id=KIND, lanes=4, page_tokens=4, max_total_tokens=48, prefill_chunk_tokens=16,
        cache_dir=str(tmp_path_factory.getbasetemp().parent / "kernels"),
        lora_adapters=tuple(f"{name}={adapter}" for name, (adapter, _) in paths.items()),
    )  # fmt: skip
    opened = open_model(tiny_model(KIND, models), adapters=config.adapters)
    engine = Engine.build(config, opened.config, opened.source)
    yield engine
    engine.stop()


def test_each_request_of_a_batch_has_its_own(engine: Engine, paths, models: Path) -> None:
    assert engine.info.adapters == ("all", "few")
    asked = [replace(request(PROMPT), adapter=name) for name in ("few", "", "all", "few")]
    got = [ids(outputs) for outputs in run(engine, *asked)]
    plain = tiny_model(KIND, models)
    want = {"": hf_greedy(plain, PROMPT, 8)} | {
        name: hf_greedy(path, PROMPT, 8) for name, (_, path) in paths.items()
    }
    assert len({tuple(answer) for answer in want.values()}) == 3
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
