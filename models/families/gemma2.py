"""Gemma 2: Gemma with soft-capped scores and logits, norms behind attention and feed-forward too, and a window in every
other layer.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .gemma import gemma
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names
from .llama import windows

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
).table()


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    layers = fields.integer("num_hidden_layers")
    types = fields.per_layer("layer_types", layers)
    if types is None:
        types = tuple("full_attention" if layer % 2 else "sliding_attention" for layer in range(layers))
    window, window_layers = windows(fields.integer("sliding_window", 4096), types)
    # Published configurations name the older form too; the cache's kind is this program's business.
    fields.skip("hidden_act", "cache_implementation")
    result = ModelConfig(
        family="gemma2",
        window=window,
        window_layers=window_layers,
        post_norms=True,
        attention_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=_softcap(fields, "attn_logit_softcapping", 50.0),
        logits_softcap=_softcap(fields, "final_logit_softcapping", 30.0),
        **gemma(fields, kv_heads=4),
    )
    fields.finish()
    return result


def _softcap(fields: Fields, key: str, default: float) -> float | None:
    """Absent means transformers' default, null means none."""
    return fields.optional_number(key) if fields.has(key) else default
