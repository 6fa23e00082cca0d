"""Qwen 3, dense: Llama with a norm over each head of queries and keys; upper layers may slide a window.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .hf import Fields
from .hf_names import IGNORED_TENSORS, WEIGHTS
from .llama import common
from .qwen2 import sliding

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    bias = fields.flag("attention_bias", False)
    window, window_layers = sliding(fields)
    result = ModelConfig(
        family="qwen3",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        window=window,
        window_layers=window_layers,
        **common(fields, max_positions=32768, kv_heads=32, head_dim=128),
    )
    fields.finish()
    return result
