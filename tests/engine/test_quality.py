"""The benchmark of quality reads a text as transformers does, window by window."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.bench import quality
from tests.support.tiny import hf_logits, tiny_model
from xlane.engine.engine import Engine


def test_perplexity_and_likeliest_tokens_are_those_of_transformers(
    engine_of: Callable[..., Engine], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "WINDOW", 32)
    ids = np.random.default_rng(0).integers(3, 131, 55).tolist()
    path = tiny_model("llama-gqa-tied", models)
    losses, likeliest = [], []
    for window in (ids[:32], ids[32:]):
        logits = hf_logits(path, window)[:-1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses += (-logprobs[np.arange(len(window) - 1), window[1:]]).tolist()
        likeliest += logits.argmax(axis=-1).tolist()
    seen = quality.quality(engine_of("llama-gqa-tied"), ids)
    assert seen.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert list(seen.likeliest) == likeliest
    other = quality.Quality(1.0, (-1, *seen.likeliest[1:]))
    assert seen.agreement(other) == pytest.approx(1 - 1 / 53)
