"""Configurations that were not made for these tests: those of published models as far as they are known, marks of their
training and all, and what transformers 5 writes of the tiny models that transformers 4 makes here."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import TINY_KINDS, tiny_model
from xlane.models.errors import UnsupportedModel
from xlane.models.registry import config_from_hf, read_config


def _configs(name: str) -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name(name).read_text())


PUBLISHED = _configs("published_configs.json")
OF_TRANSFORMERS_5 = _configs("transformers_5_configs.json")
THEIRS_ALONE = {"kimi_k2"}
"""Models that transformers itself knows by their own code only."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name: str):
    from transformers import AutoConfig

    config = PUBLISHED[name]
    ours = config_from_hf(config)
    if config["model_type"] in THEIRS_ALONE:
        return
    theirs = AutoConfig.for_model(**config)
    sizes = (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.vocab_size)
    assert (ours.hidden_size, ours.layers, ours.heads, ours.vocab_size) == sizes


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_what_transformers_5_writes_means_the_same(kind: str, tmp_path_factory: pytest.TempPathFactory):
    of_4 = read_config(tiny_model(kind, tmp_path_factory.getbasetemp() / "tiny"))
    of_5 = config_from_hf(OF_TRANSFORMERS_5[kind])
    assert replace(of_5, bos_id=None, eos_ids=()) == replace(of_4, bos_id=None, eos_ids=())


def test_what_transformers_does_not_read_either_is_told_of(caplog: pytest.LogCaptureFixture):
    config = PUBLISHED["Llama-3.2-1B-Instruct"]
    with caplog.at_level(logging.WARNING):
        assert config_from_hf({**config, "colour": "blue"}) == config_from_hf(config)
    assert "colour = 'blue'" in caplog.text


def test_weights_that_are_no_integers_are_refused():
    """AutoRound has kinds of 4 bits that are floats."""
    config = PUBLISHED["GPTQ of AutoRound"]
    floats = {**config["quantization_config"], "data_type": "mx_fp"}
    with pytest.raises(UnsupportedModel, match="data_type = 'mx_fp'"):
        config_from_hf({**config, "quantization_config": floats})


@pytest.mark.parametrize("key", ["attention_bias_of_keys", "sliding_window"])
def test_what_may_mean_something_is_refused(key: str):
    """A model that transformers does not know, and a key that means something elsewhere."""
    config = PUBLISHED["Llama-3.2-1B-Instruct"] | (
        {} if key == "sliding_window" else {"model_type": "unheard"}
    )
    with pytest.raises(UnsupportedModel, match=key):
        config_from_hf({**config, key: 5})


def test_the_author_s_factor_of_yarn_counts():
    """1.1386 is what yarn makes of a factor of 4; its author takes that back."""
    scaling = config_from_hf(PUBLISHED["DeepSeek-R1-0528-Qwen3-8B"]).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, (50.0, 30.0)), ({"attn_logit_softcapping": None}, (None, 30.0))]
)
def test_gemma_2_caps_unless_told_otherwise(
    given: dict[str, Any], expected: tuple[float | None, float | None]
):
    config = {key: value for key, value in PUBLISHED["gemma-2-9b"].items() if "softcapping" not in key}
    read = config_from_hf(config | given)
    assert (read.attention_softcap, read.logits_softcap) == expected
