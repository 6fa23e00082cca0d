"""Every family through the real engine, over two devices: greedy text is transformers'.

Scheduler, pages, several requests at once and the network are what is looked at. What comes after the logits is the same
for all families and has tests of its own, so programs are made without it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.conftest import ids, request, run
from tests.support.few_programs import few_programs
from tests.support.lora import lora
from tests.support.rounding import rounded_model
from tests.support.tiny import TINY_KINDS, hf_greedy, one_of_each, tiny_model
from xlane.engine import EngineConfig, sampler, step, traced
from xlane.engine.engine import Engine
from xlane.engine.opening import open_served
from xlane.engine.prompt_scores import SCORE_WIDTH
from xlane.models.opened import open_model

pytestmark = pytest.mark.slow

PROMPTS = [np.random.default_rng(seed).integers(3, 131, size).tolist() for seed, size in enumerate((21, 5))]
TOKENS = 8
OVER_TWO = {"kernels": "xla", "model_parallel": 2, "lanes": 1}


def greedily(logits: jax.Array, *_: Any) -> sampler.Sampled:
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    rows, most = token.shape[0], sampler.MAX_TOP_LOGPROBS
    return sampler.Sampled(
        token,
        jnp.zeros(rows, bool),
        jnp.zeros(rows),
        jnp.zeros((rows, most), jnp.int32),
        jnp.zeros((rows, most)),
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_scores(hidden: jax.Array, *_: Any) -> jax.Array:
        return jnp.zeros((hidden.shape[0], SCORE_WIDTH), jnp.int32)

    monkeypatch.setattr(step, "prompt_scores", no_scores)
    monkeypatch.setattr(traced, "source_digest", lambda: "quick")  # nobody else may read what is traced so
    monkeypatch.setattr(sampler, "_in_full", greedily)


def text(kind: str, path: Path, cache: Path, **options: Any) -> list[list[int]]:
    """What an engine answers to PROMPTS, asked at once."""
    opened = open_model(path)
    config = EngineConfig(
        model_id=kind, cache_dir=str(cache), page_tokens=4, max_total_tokens=32, prefill_chunk_tokens=8, **options
    )  # fmt: skip
    with few_programs():
        engine = Engine.build(config, opened.config, opened.source)
    try:
        return [ids(output) for output in run(engine, *(request(p, max_tokens=TOKENS) for p in PROMPTS))]
    finally:
        engine.stop()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", one_of_each(TINY_KINDS))
def test_greedy_text_is_that_of_transformers(
    kind: str, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Over two devices, each with a copy where there is one kv head; logits on one device are tested with the network."""
    path, cache = tiny_model(kind, models), tmp_path_factory.getbasetemp().parent / "kernels"
    expected = [hf_greedy(path, prompt, TOKENS) for prompt in PROMPTS]
    assert text(kind, path, cache, **OVER_TWO) == expected


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama-mha", "qwen3", "gpt2", "mixtral"])
def test_greedy_text_in_few_bits_is_that_of_transformers_with_rounded_weights(
    kind: str, quantize: str, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, cache = tiny_model(kind, models), tmp_path_factory.getbasetemp().parent / "kernels"
    expected = [hf_greedy(rounded_model(path, quantize), prompt, TOKENS) for prompt in PROMPTS]
    where = OVER_TWO if quantize == "int4" else {"lanes": 1}
    assert text(kind, path, cache, quantize=quantize, **where) == expected


@pytest.mark.usefixtures("quick")
def test_adapters_that_come_later_answer_as_merged_weights_over_two_devices_and_in_8_bits(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Merged with what is left of the weights in 8 bits, which the adapters were not rounded with."""
    plain, to = tiny_model("llama-gqa-tied", models), tmp_path_factory.mktemp("adapters")
    rounded = rounded_model(plain, "int8")
    adapters = [
        lora(rounded, to, 4, "proj", seed=1),
        lora(rounded, to, 8, r"layers\.0.*(k_proj|down_proj)", seed=2),
    ]
    config = EngineConfig(
        model_id="m", cache_dir=str(tmp_path_factory.getbasetemp().parent / "kernels"), page_tokens=4, max_total_tokens=32,
        prefill_chunk_tokens=8, quantize="int8", lora_adapters=("slots=1", "rank=8"), **OVER_TWO,
    )  # fmt: skip
    opened = open_served(config, plain)
    with few_programs():
        engine = Engine.build(config, opened.config, opened.source)
    try:
        for number, (folder, merged) in enumerate(adapters):
            name = str(number)
            engine.load_adapter(name, str(folder))
            asked = [replace(request(PROMPTS[0], max_tokens=TOKENS), adapter=one) for one in (name, "")]
            want = [hf_greedy(path, PROMPTS[0], TOKENS) for path in (merged, rounded)]
            assert want[0] != want[1]
            assert [ids(outputs) for outputs in run(engine, *asked)] == want
            engine.unload_adapter(name)
    finally:
        engine.stop()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["gemma2", "bloom", "gpt_oss", "deepseek_v3"])
def test_keys_and_values_in_8_bits_are_as_good_over_two_devices(
    kind: str, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Windows, soft-caps, slopes and sinks among them; nearly all text is that of whole keys and values."""
    path, cache = tiny_model(kind, models), tmp_path_factory.getbasetemp().parent / "kernels"
    alone = text(kind, path, cache, lanes=1, kernels="xla", kv_dtype="int8")
    assert text(kind, path, cache, kv_dtype="int8", **OVER_TWO) == alone
    whole = [hf_greedy(path, prompt, TOKENS) for prompt in PROMPTS]
    same = [ours == theirs for mine, good in zip(alone, whole) for ours, theirs in zip(mine, good)]
    assert sum(same) >= 0.75 * len(same)
