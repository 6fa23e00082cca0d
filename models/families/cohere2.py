"""Command R7B and A (Cohere 2): Cohere with a window in three of four layers, the only ones that rotate.

Knows config.json's keys and transformers' defaults for them.
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
    layers, every = fields.integer("num_hidden_layers"), fields.integer("sliding_window_pattern", 4)
    bias = fields.flag("attention_bias", False)
    types = fields.per_layer("layer_types", layers)
    if types is None:
        types = tuple("sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers))
    window, window_layers = windows(fields.integer("sliding_window", 4096), types)
    fields.skip("_sliding_window_pattern", "cache_implementation", "order_of_interleaved_layers")
    result = ModelConfig(
        family="cohere2",
        norm="layer",
        parallel=True,
        shared_norm=True,
        rope_interleaved=True,
        rope_layers=tuple(kind == "sliding_attention" for kind in types),
        window=window,
        window_layers=window_layers,
        qkv_bias=bias,
        output_bias=bias,
        logits_scale=fields.number("logit_scale", 0.0625),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        **common(fields, max_positions=8192, norm_eps="layer_norm_eps", norm_eps_default=1e-5),
    )
    fields.finish()
    return result
