"""A prompt's own log-probabilities: transformers' numbers, once each, however the prompt was cut, packed or interrupted;
and no more memory or work than that takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.conftest import ids, request, run
from tests.support import reference
from tests.support.tiny import hf_logits, tiny_model
from xlane.engine import EngineConfig, Request, StepOutput, TokenOutput
from xlane.engine.batch import read_scores
from xlane.engine.build import design
from xlane.engine.programs import compile_all
from xlane.engine.prompt_scores import LEAST_ROWS, SCORE_WIDTH, prompt_scores
from xlane.engine.sampler import ONE_DEVICE
from xlane.engine.turn import Size
from xlane.models.opened import open_model

pytestmark = pytest.mark.slow

PROMPTS = [
    np.random.default_rng(seed).integers(3, 131, size).tolist()
    for seed, size in enumerate((5, 80, 1, 17, 33, 2, 32))
]
"""Chunks hold 32 tokens: some prompts share one, some end with one, one takes three."""


def scored(prompt: list[int], alternatives: int = 3, **sampling) -> Request:
    return dataclasses.replace(request(prompt, **sampling), prompt_logprobs=alternatives)


def prompt_of(outputs: list[StepOutput]) -> tuple[TokenOutput, ...]:
    """All in the first output, nothing later."""
    assert not any(output.prompt for output in outputs[1:])
    return outputs[0].prompt


def check(path, prompt: list[int], told: tuple[TokenOutput, ...], alternatives: int) -> None:
    """Against transformers' log-softmax at each position."""
    assert [token.id for token in told] == prompt[1:]
    for logits, token in zip(hf_logits(path, prompt), told):
        logprobs = np.array(reference.log_softmax(logits.tolist()))
        assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-4)
        best = np.argsort(-logprobs)[:alternatives]
        assert [top for top, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(logprobs[best].tolist(), abs=1e-4)


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_they_equal_transformers_across_chunks_and_packed_with_others(
    engine_of, models, kernels: str
) -> None:
    engine = engine_of(kernels=kernels)
    asked = [scored(p, index % 4, max_tokens=3) for index, p in enumerate(PROMPTS)]
    silent = [request(p, max_tokens=3, temperature=0.7) for p in PROMPTS]
    outputs = run(engine, *(one for pair in zip(asked, silent) for one in pair))
    path = tiny_model("llama-gqa-tied", models)
    for index, prompt in enumerate(PROMPTS):
        check(path, prompt, prompt_of(outputs[2 * index]), index % 4)
        assert prompt_of(outputs[2 * index + 1]) == ()
    assert engine.stats().compiles_after_ready == 0


def test_they_are_the_models_own_whatever_the_sampling(engine_of, models) -> None:
    shaped = {"temperature": 0.3, "top_k": 2, "logit_bias": ((5, 50.0),), "repetition_penalty": 1.8}
    (output,) = run(engine_of(), scored(PROMPTS[3], 2, max_tokens=2, **shaped))
    check(tiny_model("llama-gqa-tied", models), PROMPTS[3], prompt_of(output), 2)


def test_preempted_sequences_tell_them_once(engine_of, models) -> None:
    page = 2 * 2 * 2 * 4 * 16 * 4
    tight = engine_of(kv_bytes=30 * page)
    prompts = [p[:48] for p in PROMPTS]
    outputs = run(tight, *(scored(p, 1, max_tokens=40) for p in prompts))
    assert tight.stats().preemptions > 0
    path = tiny_model("llama-gqa-tied", models)
    for prompt, output in zip(prompts, outputs):
        check(path, prompt, prompt_of(output), 1)
        assert len(ids(output)) == 40


def test_a_resumed_request_tells_those_of_its_prompt_alone(engine_of, models) -> None:
    whole = scored(PROMPTS[4], 2, max_tokens=8)
    (output,) = run(engine_of(), whole)
    resumed = dataclasses.replace(whole, id="rest", resume_ids=tuple(ids(output)[:5]))
    (rest,) = run(engine_of(), resumed)
    assert ids(rest) == ids(output)[5:]
    check(tiny_model("llama-gqa-tied", models), PROMPTS[4], prompt_of(rest), 2)


def test_they_do_not_depend_on_the_mesh(engine_of, models) -> None:
    kind = "llama-mha-even-vocab"
    path = tiny_model(kind, models)
    for mesh in ({"model_parallel": 4}, {"data_parallel": 2, "model_parallel": 2}):
        outputs = run(engine_of(kind, **mesh), *(scored(p, 3, max_tokens=2) for p in PROMPTS[:4]))
        for prompt, output in zip(PROMPTS, outputs):
            check(path, prompt, prompt_of(output), 3)


TOKENS, HIDDEN, VOCAB = 70, 8, 37


@pytest.mark.parametrize(
    ("asked", "blocks"), [((), 0), ((0,), 1), ((31, 32), 2), ((69,), 1), ((5, 69), 3), (tuple(range(70)), 3)]
)
def test_only_blocks_that_are_asked_for_are_computed(asked: tuple[int, ...], blocks: int) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    weight = rng.normal(size=(HIDDEN, VOCAB)).astype(np.float32)
    targets = np.full(TOKENS, -1, np.int32)
    targets[list(asked)] = rng.integers(0, VOCAB, len(asked))
    computed: list[int] = []

    def head(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: computed.append(1))
        return jnp.dot(x, weight, precision="highest")

    run = jax.jit(lambda h, t: prompt_scores(h, t, jnp.int32(2), head, LEAST_ROWS, ONE_DEVICE))
    rows = np.asarray(run(hidden, targets))
    jax.effects_barrier()
    assert len(computed) == blocks
    assert rows.shape == (TOKENS, SCORE_WIDTH)
    told = read_scores(rows, tuple(targets.tolist()), 2)
    assert [token.id for token in told] == targets[list(asked)].tolist()
    for place, token in zip(asked, told):
        expected = reference.log_softmax((hidden[place].astype(float) @ weight).tolist())
        assert token.logprob == pytest.approx(expected[token.id], abs=1e-5)
        assert [top for top, _ in token.top] == np.argsort(-np.array(expected))[:2].tolist()


def test_the_logits_of_a_whole_prompt_are_never_there_at_once(models) -> None:
    """By the compiler's own count, and within `estimate_temp_bytes`: longer prompts need room for activations, not for T x V numbers."""
    opened = open_model(tiny_model("llama-gqa-tied", models), weights=False)
    model = dataclasses.replace(opened.config, vocab_size=50_000)
    config = EngineConfig(model_id="m", kernels="xla", lanes=1, page_tokens=16, max_total_tokens=256, prefill_chunk_tokens=256)  # fmt: skip
    blueprint = dataclasses.replace(design(config, model)[0], sizes=(Size(0, 64), Size(0, 256)))
    short, long = (info for info in compile_all(blueprint).infos if info.name.startswith("prefill"))
    logits_bytes = 4 * 50_000
    assert short.temp_bytes < 8 * LEAST_ROWS * logits_bytes
    assert long.temp_bytes - short.temp_bytes < 0.1 * (256 - 64) * logits_bytes
