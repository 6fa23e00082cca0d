"""The sampler against its naive reference, its randomness against the distribution, and what it must never contain."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance.numpy import apply_token_bitmask_inplace
from scipy.stats import chisquare

from tests.support import reference
from xlane.engine import SamplingParams
from xlane.engine import sampler as engine_sampler
from xlane.engine.request import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS
from xlane.engine.sampler import (
    LOGPROBS_PROCESSED,
    LOGPROBS_RAW,
    Sampled,
    SamplingRows,
    exclude,
    mask_width,
)
from xlane.engine.state import MAX_STOP_IDS
from xlane.engine.watermark import Watermark
from xlane.models import rowwise

VOCAB = 19
"""Not a multiple of anything, and small enough that the alternatives reported are the whole distribution."""


@jax.jit
def sample(
    logits: jax.Array, rows: SamplingRows, seen: jax.Array, lanes: jax.Array, position: jax.Array
) -> Sampled:
    """After the last token of OUTPUT."""
    previous = jnp.full_like(position, OUTPUT[-1])
    return engine_sampler.sample(logits, rows, seen, lanes, position, previous, Watermark(0.5, 2.0))


cut = jax.jit(engine_sampler.cut)
penalize = jax.jit(engine_sampler.penalize)
threshold = jax.jit(engine_sampler.threshold)
top = jax.jit(engine_sampler.top)
argmax = jax.jit(rowwise.argmax)
gumbel = jax.jit(engine_sampler.gumbel, static_argnums=2)
ordered_bits = jax.jit(engine_sampler.ordered_bits)


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "temperature": 1.0, **changes})


def rows_of(wanted: Sequence[SamplingParams], mode: int = LOGPROBS_PROCESSED, top_n: int = 0) -> SamplingRows:
    """The parameters as the device holds them."""

    def column(name: str, dtype) -> jax.Array:
        return jnp.array([getattr(s, name) for s in wanted], dtype)

    def table(values: list[list], dtype) -> jax.Array:
        return jnp.array([[*row, *[0] * (MAX_LOGIT_BIAS - len(row))] for row in values], dtype)

    count = len(wanted)
    return SamplingRows(
        temperature=column("temperature", jnp.float32),
        top_k=column("top_k", jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        typical_p=column("typical_p", jnp.float32),
        repetition=column("repetition_penalty", jnp.float32),
        frequency=column("frequency_penalty", jnp.float32),
        presence=column("presence_penalty", jnp.float32),
        seed=jnp.array([divmod(s.seed, 1 << 32) for s in wanted], jnp.uint32),
        logprobs=jnp.full(count, mode, jnp.int32),
        top_n=jnp.full(count, top_n, jnp.int32),
        bias_ids=table([[token for token, _ in s.logit_bias] for s in wanted], jnp.int32),
        bias=table([[bias for _, bias in s.logit_bias] for s in wanted], jnp.float32),
        stop=jnp.array([[*s.stop_ids, *[-1] * (MAX_STOP_IDS - len(s.stop_ids))] for s in wanted], jnp.int32),
        watermark=column("watermark", jnp.int32),
        stop_from=jnp.array(
            [row + 7 - len(OUTPUT) + s.min_tokens for row, s in enumerate(wanted)], jnp.int32
        ),
    )


def logits_of(count: int, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, vocab)) * spread).astype(np.float32)


def distributions(sampled: Sampled, vocab: int = VOCAB) -> np.ndarray:
    """float32[R, V] of log-probabilities, from alternatives that are the whole vocabulary."""
    ids, values = np.asarray(sampled.top_ids)[:, :vocab], np.asarray(sampled.top_logprobs)[:, :vocab]
    whole = np.full(ids.shape, np.nan, np.float32)
    np.put_along_axis(whole, ids, values, axis=1)
    return whole


def same(ours: np.ndarray, expected: Sequence[Sequence[float]], atol: float = 2e-5) -> None:
    """Equal numbers, and exactly the same exclusions."""
    wanted = np.array(expected)
    assert np.isneginf(ours).tolist() == np.isneginf(wanted).tolist()
    np.testing.assert_allclose(ours, wanted, rtol=2e-6, atol=atol)


MIXED = [
    params(temperature=0.0),
    params(),
    params(temperature=0.7, top_k=5),
    params(temperature=1.3, top_p=0.8),
    params(min_p=0.1),
    params(typical_p=0.6),
    params(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, typical_p=0.1),
    params(repetition_penalty=1.4),
    params(frequency_penalty=0.7, presence_penalty=-0.4),
    params(temperature=0.5, repetition_penalty=0.8, frequency_penalty=-0.3, presence_penalty=1.1),
    params(temperature=0.9, top_k=12, top_p=0.9, min_p=0.02, typical_p=0.95),
    params(
        temperature=1.7, top_k=9, top_p=0.7, min_p=0.05, typical_p=0.8, repetition_penalty=1.2, presence_penalty=0.5
    ),
    params(temperature=0.0, repetition_penalty=2.0, frequency_penalty=1.0),
    params(temperature=0.0, logit_bias=((4, 2.5), (0, -100.0))),
    params(temperature=0.6, logit_bias=tuple((token, token / 7 - 1) for token in range(VOCAB)), top_k=7),
    params(logit_bias=((11, 6.0), (3, -2.0)), repetition_penalty=1.6, frequency_penalty=0.3),
    params(min_tokens=6, stop_ids=(2, 5, VOCAB - 1, VOCAB, 2**31 - 1), max_tokens=9),
    params(watermark=True),
    params(temperature=0.0, watermark=True, repetition_penalty=1.5),
    params(temperature=0.8, watermark=True, logit_bias=((5, 1.0),), top_p=0.8),
    params(min_tokens=5, stop_ids=(2, 5, VOCAB - 1), max_tokens=9),
    params(temperature=0.0, min_tokens=8, stop_ids=tuple(range(1, 18)), logit_bias=((3, 100.0),), max_tokens=9),
]  # fmt: skip
"""Greedy and sampled rows side by side, each transform alone and all together."""

PROMPT = [3, 3, 7, 0]
OUTPUT = [7, 11, 11, 11, 18]


def sample_mixed(
    logits: np.ndarray, mode: int = LOGPROBS_PROCESSED, wanted: Sequence[SamplingParams] = MIXED
) -> Sampled:
    """Sample rows that have all seen PROMPT and OUTPUT, at positions 7, 8, … Filled up to one shape: one compilation."""
    count, missing = len(wanted), len(MIXED) - len(wanted)
    logits = np.concatenate([logits, np.zeros((missing, VOCAB), np.float32)])
    seen = jnp.array(np.tile(reference.seen(VOCAB, PROMPT, OUTPUT), (len(MIXED), 1)))
    lanes = jnp.arange(len(MIXED), dtype=jnp.int32)
    rows = rows_of([*wanted, *MIXED[:1] * missing], mode, top_n=VOCAB)
    return jax.tree.map(lambda x: x[:count], sample(jnp.array(logits), rows, seen, lanes, lanes + 7))


def quantised(seed: int) -> np.ndarray:
    """Many ties, and logits that are 0."""
    return np.round(logits_of(len(MIXED), seed=seed))


def excluded(seed: int) -> np.ndarray:
    """Half of the tokens are masked out before sampling."""
    logits = logits_of(len(MIXED), seed=seed)
    logits[:, 1::2] = -np.inf
    return logits


def extreme(seed: int) -> np.ndarray:
    """Logits so far apart that all but one probability is 0 in float32."""
    return logits_of(len(MIXED), spread=1e4, seed=seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [lambda seed: logits_of(len(MIXED), seed=seed), quantised, excluded])
def test_the_distribution_sampled_from_equals_the_reference(make, seed: int) -> None:
    logits = make(seed)
    ours = distributions(sample_mixed(logits))
    same(
        ours,
        [reference.log_softmax(reference.processed(x, s, PROMPT, OUTPUT)) for x, s in zip(logits, MIXED)],
    )


def test_extreme_logits_stay_numbers() -> None:
    logits = extreme(0)
    sampled = sample_mixed(logits)
    assert not np.isnan(distributions(sampled)).any()
    for row, s in enumerate(MIXED):
        expected = reference.processed(logits[row], s, PROMPT, OUTPUT)
        assert int(sampled.token[row]) == int(np.argmax(expected))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-44])
def test_a_tiny_temperature_is_greedy_and_reports_numbers(temperature: float) -> None:
    """Dividing by it makes logits infinite, and an infinite one less another infinite one is not a number."""
    logits = logits_of(3, spread=30.0)
    wanted = [params(temperature=temperature), params(temperature=temperature, top_p=0.9), params(temperature=temperature, typical_p=0.5)]  # fmt: skip
    sampled = sample_mixed(logits, wanted=wanted)
    assert sampled.token.tolist() == logits.argmax(axis=1).tolist()
    if temperature > 1e-38:  # below, the device takes it for 0: greedy, and the distribution is the logits'
        assert np.asarray(sampled.logprob).tolist() == [0.0] * 3


def test_raw_log_probabilities_are_the_models_own() -> None:
    logits = logits_of(len(MIXED))
    sampled = sample_mixed(logits, LOGPROBS_RAW)
    ours = distributions(sampled)
    same(ours, [reference.log_softmax(x) for x in logits])
    assert (
        np.asarray(sampled.logprob).tolist()
        == ours[np.arange(len(MIXED)), np.asarray(sampled.token)].tolist()
    )


def test_processed_log_probabilities_of_excluded_tokens_are_minus_infinity() -> None:
    sampled = sample_mixed(logits_of(1), wanted=[params(top_k=3)])
    values = np.asarray(sampled.top_logprobs)[0, :VOCAB]
    assert np.isfinite(values[:3]).all()
    assert np.isneginf(values[3:]).all()
    assert sorted(np.asarray(sampled.top_ids)[0, :VOCAB].tolist()) == list(range(VOCAB))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("top_k", 4, partial(reference.top_k, k=4)),
        ("top_k", 1, partial(reference.top_k, k=1)),
        ("top_k", 10_000, partial(reference.top_k, k=10_000)),
        ("top_p", 0.5, partial(reference.top_p, p=0.5)),
        ("top_p", 1e-9, partial(reference.top_p, p=1e-9)),
        ("min_p", 0.2, partial(reference.min_p, p=0.2)),
        ("min_p", 1.0, partial(reference.min_p, p=1.0)),
        ("typical_p", 0.4, partial(reference.typical_p, p=0.4)),
        ("typical_p", 1e-9, partial(reference.typical_p, p=1e-9)),
    ],
)
@pytest.mark.parametrize("vocab", [19, 131])
def test_one_cut_alone(vocab: int, name: str, value: float, expected) -> None:
    logits = np.concatenate([logits_of(4, vocab), np.round(logits_of(4, vocab, spread=2.0, seed=1))])
    logits[2, ::3] = -np.inf
    wanted = [params(**{name: value}) for _ in logits]
    same(np.asarray(cut(jnp.array(logits), rows_of(wanted))), [expected(x) for x in logits], atol=0)


def test_ties_with_the_last_kept_are_kept() -> None:
    logits = jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0], [0.0, -0.0, -1.0, -1.0, -2.0]], jnp.float32)
    ours = np.asarray(cut(logits, rows_of([params(top_k=2), params(top_k=1)])))
    assert np.isfinite(ours).tolist() == [[True] * 4 + [False], [True, True] + [False] * 3]


def test_a_bias_counts_for_greedy_rows_and_leaves_the_models_own_log_probabilities() -> None:
    logits = logits_of(2)
    wanted = [params(temperature=0.0, logit_bias=((6, 100.0),)), params(temperature=0.0)]
    sampled = sample_mixed(logits, LOGPROBS_RAW, wanted)
    assert sampled.token.tolist() == [6, int(logits[1].argmax())]
    same(distributions(sampled), [reference.log_softmax(x) for x in logits])


def test_biases_are_added_before_penalties_as_openai_and_vllm_do() -> None:
    """A bias may change the sign of a logit, and with it what a repetition penalty does."""
    logits = np.zeros((1, VOCAB), np.float32)
    s = params(temperature=0.0, logit_bias=((3, 2.0), (4, 1.5)), repetition_penalty=2.0)
    sampled = sample_mixed(logits, wanted=[s])
    assert int(sampled.token[0]) == 4  # 3 is in the prompt: 2.0 / 2.0 < 1.5
    assert distributions(sampled)[0, 3] - distributions(sampled)[0, 1] == pytest.approx(1.0)


def test_a_stop_id_may_be_chosen_from_the_last_held_token_on() -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 4] = 9.0
    wanted = [params(temperature=0.0, min_tokens=n, max_tokens=9, stop_ids=(4,)) for n in (4, 5, 6)]
    assert sample_mixed(logits, wanted=wanted).token.tolist() == [4, 4, 0]


def test_a_row_with_nothing_but_stop_ids_left_may_stop() -> None:
    """A grammar may be at its end before `min_tokens` are there."""
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[:, 4] = 1.0
    s = params(min_tokens=9, max_tokens=9, stop_ids=(4, 2))
    assert sample_mixed(logits, wanted=[s]).token.tolist() == [4]


def test_penalties_alone() -> None:
    wanted = [
        params(repetition_penalty=1.7),
        params(frequency_penalty=0.9),
        params(presence_penalty=0.9),
        params(),
    ]
    logits = logits_of(4)
    seen = jnp.array(np.tile(reference.seen(VOCAB, PROMPT, OUTPUT), (4, 1)))
    ours = np.asarray(penalize(jnp.array(logits), rows_of(wanted), seen))
    same(ours, [reference.penalized(x, s, PROMPT, OUTPUT) for x, s in zip(logits, wanted)], atol=1e-6)


def test_each_row_reads_the_penalties_of_its_own_lane() -> None:
    seen = np.zeros((3, VOCAB), np.int32)
    seen[1, 4] = 5
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 4] = 1.0
    wanted = rows_of([params(temperature=0.0, frequency_penalty=1.0)] * 2)
    sampled = sample(
        jnp.array(logits), wanted, jnp.array(seen), jnp.array([1, 2], jnp.int32), jnp.zeros(2, jnp.int32)
    )
    assert sampled.token.tolist() == [0, 4]


def test_rows_nobody_uses_change_nothing_and_ask_for_no_work() -> None:
    """Their parameters are what another request left: with every transform on, they must not switch one on."""
    logits = logits_of(2)
    left = replace(MIXED[-5], logit_bias=((2, 5.0),))
    wanted = rows_of([params(temperature=0.0), left], top_n=VOCAB)._replace(
        logprobs=jnp.array([0, 2], jnp.int32)
    )
    seen, position = jnp.zeros((4, VOCAB), jnp.int32), jnp.zeros(2, jnp.int32)
    sampled = sample(jnp.array(logits), wanted, seen, jnp.array([0, 4], jnp.int32), position)
    assert int(sampled.token[0]) == int(logits[0].argmax())
    assert not np.asarray(sampled.logprob).any()
    assert not np.asarray(sampled.top_logprobs).any()


keys_and_weights = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1]), min_size=n, max_size=n
        ),
        st.lists(st.integers(0, 50), min_size=n, max_size=n),
        st.integers(1, 600),
    )
)


@settings(max_examples=150, deadline=None)
@given(keys_and_weights)
def test_threshold_equals_its_definition_by_sorting(case: tuple[list[int], list[int], int]) -> None:
    """Integer weights, so that float32 sums are exact."""
    keys, weights, target = case
    padded_keys, padded_weights = np.zeros((1, 40), np.uint32), np.zeros((1, 40), np.float32)
    padded_keys[0, : len(keys)], padded_weights[0, : len(keys)] = keys, weights
    (bound,) = threshold(
        jnp.array(padded_keys), jnp.array(padded_weights), jnp.array([target], jnp.float32)
    ).tolist()
    ranked = sorted(zip(keys, weights), reverse=True)
    reached = [key for i, (key, _) in enumerate(ranked) if sum(w for _, w in ranked[: i + 1]) >= target]
    assert bound == (reached[0] if reached else 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2))
def test_ordered_bits_keep_the_order_of_floats(pair: list[float]) -> None:
    a, b = ordered_bits(jnp.array(pair, jnp.float32)).tolist()
    tiny = 2.0**-126  # the device takes smaller numbers for 0
    x, y = (0.0 if abs(value) < tiny else value for value in pair)
    assert (a < b, a == b) == (x < y, x == y)


def test_argmax_takes_the_first_of_equals() -> None:
    x = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -jnp.inf], [0.0, -0.0, -1.0], [-5.0, -4.0, jnp.inf]])
    assert argmax(x.astype(jnp.float32)).tolist() == [1, 0, 0, 2]


def test_top_is_best_first_with_ties_in_order_and_each_once() -> None:
    x = np.round(logits_of(5, 40))
    x[4, :35] = -np.inf
    ids, values = map(np.asarray, top(jnp.array(x), jnp.int32(MAX_TOP_LOGPROBS)))
    for row in range(5):
        expected = sorted(range(40), key=lambda i: (-x[row, i], i))[:MAX_TOP_LOGPROBS]
        assert ids[row].tolist() == expected
        assert values[row].tolist() == x[row, expected].tolist()
    fewer, _ = map(np.asarray, top(jnp.array(x), jnp.int32(3)))
    assert fewer[:, :3].tolist() == ids[:, :3].tolist()
    assert not fewer[:, 3:].any()


@pytest.mark.parametrize(
    "wanted",
    [params(), params(temperature=0.6), params(top_k=4), params(temperature=1.5, top_p=0.7), params(min_p=0.2), params(typical_p=0.5)],
)  # fmt: skip
def test_tokens_are_drawn_in_proportion(wanted: SamplingParams) -> None:
    """Chi-square over 20 000 positions of ten seeds. Seeds are fixed, so this passes or fails for ever."""
    logits = logits_of(1, spread=1.0, seed=5)
    expected = np.exp(reference.log_softmax(reference.processed(logits[0], wanted)))
    count, counts = 2000, np.zeros(VOCAB)
    rows = jnp.array(np.tile(logits, (count, 1)))
    seen, lanes = jnp.zeros((count, VOCAB), jnp.int32), jnp.arange(count, dtype=jnp.int32)
    for seed in range(10):
        one = rows_of([wanted], mode=0)._replace(seed=jnp.array([[0, seed]], jnp.uint32))
        drawn = sample(rows, jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), one), seen, lanes, lanes)
        counts += np.bincount(np.asarray(drawn.token), minlength=VOCAB)
    possible = expected > 0
    assert counts[~possible].sum() == 0  # what is excluded is never drawn
    assert chisquare(counts[possible], expected[possible] * counts.sum()).pvalue > 1e-3


def test_noise_follows_seed_and_position_alone() -> None:
    alone = gumbel(jnp.array([[7, 9]] * 5, jnp.uint32), jnp.array([41] * 5, jnp.int32), VOCAB)
    seeds = jnp.array([[0, 0], [7, 9], [7, 9], [9, 7], [7, 9]], jnp.uint32)
    among = np.asarray(gumbel(seeds, jnp.array([41, 40, 41, 41, 41], jnp.int32), VOCAB))
    assert among[2].tolist() == among[4].tolist() == np.asarray(alone)[0].tolist()
    assert len({row.tobytes() for row in among}) == 4


def test_a_row_draws_the_same_token_alone_and_among_others() -> None:
    logits = logits_of(len(MIXED), spread=0.5)
    position = jnp.arange(len(MIXED), dtype=jnp.int32) + 7
    among, among_rows = sample_mixed(logits).token.tolist(), rows_of(MIXED)
    for row in range(len(MIXED)):
        seen = jnp.array(reference.seen(VOCAB, PROMPT, OUTPUT)[None])
        alone = sample(
            jnp.array(logits[row : row + 1]),
            jax.tree.map(lambda x, row=row: x[row : row + 1], among_rows),
            seen,
            jnp.zeros(1, jnp.int32),
            position[row : row + 1],
        )
        assert int(alone.token[0]) == among[row]


def test_both_halves_of_a_seed_count() -> None:
    seeds = [divmod(seed, 1 << 32) for seed in (5, 5 + 2**32, 5 + 2**63, 2**64 - 1, 2**32 - 1)]
    noise = np.asarray(gumbel(jnp.array(seeds, jnp.uint32), jnp.zeros(5, jnp.int32), VOCAB))
    assert len({row.tobytes() for row in noise}) == 5


def lowered() -> Any:
    """The sampler as the device gets it."""
    numbers = jnp.zeros(len(MIXED), jnp.int32)
    seen = jnp.zeros((len(MIXED), VOCAB), jnp.int32)
    return sample.lower(jnp.array(logits_of(len(MIXED))), rows_of(MIXED), seen, numbers, numbers)


def test_nothing_is_ever_sorted() -> None:
    assert not re.search(r"stablehlo\.sort|chlo\.top_k", lowered().as_text())
    assert not re.search(r" sort\(| topk\(|TopK", lowered().compile().as_text())


def test_a_greedy_batch_pays_for_nothing_else() -> None:
    """Penalties, masks, temperature, cuts, noise and reports are all behind one condition."""
    text = lowered().as_text()
    entry = text[text.index("func.func public @main") :].split("func.func private")[0]
    always = [line for line in entry.splitlines() if line.startswith("    %")]
    assert sum("stablehlo.case" in line for line in always) == 1
    assert not [line for line in always if re.search("exponential|log|divide|threefry|while|uniform", line)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 15), st.sampled_from([VOCAB, 32, 33]))
def test_masks_exclude_what_llguidance_itself_excludes(seed: int, masked: int, vocab: int) -> None:
    """Bit by bit as its own NumPy kernel, in the rows that are masked; the others keep every bit."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, vocab)).astype(np.float32)
    words = rng.integers(-(2**31), 2**31, (4, mask_width(vocab) - 1)).astype(np.int32)
    flags = np.array([[masked >> row & 1] for row in range(4)], np.int32)
    ours = np.asarray(exclude(jnp.array(logits), jnp.array(np.concatenate([flags, words], axis=1))))
    expected = logits.copy()
    apply_token_bitmask_inplace(expected, words)
    np.testing.assert_array_equal(ours, np.where(flags == 1, expected, logits))
