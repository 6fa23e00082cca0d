"""Mistral 7B and its kin: Llama with a sliding window over every layer, which later releases switch off (null).

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .hf import Fields
from .hf_names import IGNORED_TENSORS, WEIGHTS
from .llama import common

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    # Absent means transformers' default of 4096, null means no window: the first releases left it out.
    window = fields.optional_integer("sliding_window") if fields.has("sliding_window") else 4096
    result = ModelConfig(
        family="mistral",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        window=window,
        **common(fields, max_positions=4096 * 32, kv_heads=8),
    )
    fields.finish()
    return result
