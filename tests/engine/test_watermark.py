"""The green list against plain Python, and a detector that tells marked text from plain text."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.conftest import ids, request, run
from tests.support import reference
from xlane.engine import EngineConfig, PlanError
from xlane.engine.build import design
from xlane.engine.watermark import Watermark, green, mark
from xlane.models.opened import open_model

from ..support.tiny import tiny_model

PROMPTS = np.random.default_rng(3).integers(3, 131, (8, 6)).tolist()


def test_the_finaliser_is_murmurs() -> None:
    """Values of its author's own code."""
    assert [reference.finalised(x) for x in (0, 1, 2)] == [0, 0x514E28B7, 0x30F4C306]


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.75])
def test_the_green_list_equals_the_reference(gamma: float) -> None:
    previous = [0, 1, 5, 130, 151_935]
    ours = np.asarray(green(jnp.array(previous, jnp.int32), 301, gamma))
    assert ours.tolist() == [reference.green(token, 301, gamma) for token in previous]


@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_green_lists_have_their_share_and_do_not_resemble_each_other(gamma: float) -> None:
    lists = np.asarray(green(jnp.arange(200, dtype=jnp.int32), 5000, gamma)).astype(float)
    sigma = (gamma * (1 - gamma) / 5000) ** 0.5
    assert np.abs(lists.mean(axis=1) - gamma).max() < 4.5 * sigma
    assert np.abs(lists.mean(axis=0) - gamma).max() < 5.5 * (gamma * (1 - gamma) / 200) ** 0.5
    alike = np.corrcoef(lists) - np.eye(200)
    assert np.abs(alike).max() < 6 / 5000**0.5


def test_only_the_rows_that_want_it_are_marked() -> None:
    logits = jnp.zeros((2, 131), jnp.float32)
    marked = mark(logits, jnp.array([9, 9], jnp.int32), jnp.array([False, True]), Watermark(0.25, 3.0))
    assert not np.asarray(marked[0]).any()
    assert marked[1].tolist() == reference.marked([0.0] * 131, 9, 0.25, 3.0)


def test_a_detector_tells_marked_text_from_plain(engine_of) -> None:
    """Each text is judged by itself, from its tokens alone."""
    how = {"max_tokens": 80, "temperature": 1.0}
    asked = [request(p, seed=i, watermark=i % 2 == 0, **how) for i, p in enumerate(PROMPTS)]
    scores = [
        reference.watermark_z([prompt[-1], *ids(output)], 131)
        for prompt, output in zip(PROMPTS, run(engine_of(), *asked))
    ]
    assert min(scores[::2]) > 4.0 > 3.0 > max(scores[1::2])


def test_gamma_and_delta_are_the_engines(engine_of) -> None:
    """So strong a mark leaves nothing but green tokens, and those are few."""
    engine = engine_of(watermark_gamma=0.1, watermark_delta=60.0)
    outputs = run(engine, *(request(p, max_tokens=40, watermark=True) for p in PROMPTS))
    for prompt, output in zip(PROMPTS, outputs):
        for previous, token in itertools.pairwise([prompt[-1], *ids(output)]):
            assert reference.green(previous, 131, 0.1)[token]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"watermark_gamma": 0.0}, "watermark_gamma=0.0"), ({"watermark_gamma": 1.0}, "watermark_gamma=1.0"),
     ({"watermark_delta": float("inf")}, "watermark_delta=inf")],
)  # fmt: skip
def test_a_mark_that_cannot_be_is_refused(models, options: dict, message: str) -> None:
    model = open_model(tiny_model("llama-gqa-tied", models), weights=False).config
    with pytest.raises(PlanError, match=message):
        design(EngineConfig(model_id="m", **options), model)


def test_nothing_is_sorted_or_permuted() -> None:
    text = jax.jit(lambda x: green(x, 131, 0.5)).lower(jnp.zeros(2, jnp.int32)).as_text()
    assert not any(word in text for word in ("sort", "gather", "while"))
