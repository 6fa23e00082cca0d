"""Gemma 3, text: Gemma 2 without soft-caps, with norms over queries and keys, and layers with a window that rotate by a
base of their own.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .gemma import gemma
from .gemma2 import WEIGHTS
from .hf import Fields
from .hf_names import IGNORED_TENSORS
from .llama import windows

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(_one_rope(config))
    layers, every = fields.integer("num_hidden_layers"), fields.integer("sliding_window_pattern", 6)
    types = fields.per_layer("layer_types", layers)
    if types is None:
        types = tuple("sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers))
    window, window_layers = windows(fields.integer("sliding_window", 4096), types)
    fields.skip("cache_implementation", "_sliding_window_pattern")
    result = ModelConfig(
        family="gemma3",
        window=window,
        window_layers=window_layers,
        post_norms=True,
        qk_norm="head",
        rope_local_theta=fields.number("rope_local_base_freq", 10000.0),
        attention_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        logits_softcap=fields.optional_number("final_logit_softcapping"),
        **gemma(fields, kv_heads=4, rope_theta=1000000.0, max_positions=131072),
    )
    fields.finish()
    return result


def _one_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """As transformers 4 writes it: 5 has rotary parameters for each kind of layer."""
    both = config.get("rope_parameters")
    if not isinstance(both, dict) or set(both) != {"full_attention", "sliding_attention"}:
        return config
    local = Fields(both["sliding_attention"], "config.json: rope_parameters: sliding_attention")
    if (kind := local.text("rope_type", default="default")) != "default":
        raise UnsupportedModel(f"config.json: rope type {kind!r} is not supported in layers with a window")
    theta = local.number("rope_theta", 10000.0)
    local.finish()
    return {**config, "rope_parameters": both["full_attention"], "rope_local_base_freq": theta}
