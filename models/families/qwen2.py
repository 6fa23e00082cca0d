"""Qwen 2 and 2.5: Llama with biases on queries, keys and values; upper layers may slide a window.

Knows config.json's keys and transformers' defaults for them. Qwen 3 shares the reading of windows.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .hf import Fields
from .hf_names import IGNORED_TENSORS, WEIGHTS
from .llama import common, windows

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    window, window_layers = sliding(fields)
    result = ModelConfig(
        family="qwen2",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=True,
        window=window,
        window_layers=window_layers,
        **common(fields, max_positions=32768, kv_heads=32),
    )
    fields.finish()
    return result


def sliding(fields: Fields) -> tuple[int | None, tuple[bool, ...]]:
    """Qwen's window: off unless `use_sliding_window`, then on from layer `max_window_layers` up or as `layer_types` say."""
    layers = fields.integer("num_hidden_layers")
    types = fields.per_layer("layer_types", layers)
    if not fields.flag("use_sliding_window", False):
        # Published configurations keep a size here that nothing uses.
        fields.skip("sliding_window", "max_window_layers")
        windows(None, types)
        return None, ()
    first = fields.whole("max_window_layers", 28)
    if types is None:
        types = tuple("full_attention" if layer < first else "sliding_attention" for layer in range(layers))
    return windows(fields.integer("sliding_window", 4096), types)
