"""Gemma: Llama with norms stored around 0, a gate of GELU, and embeddings scaled by the root of their width.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .hf import Fields
from .hf_names import IGNORED_TENSORS, WEIGHTS
from .llama import common

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf", "gemma"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    # Whatever this says, the first releases were trained with the tanh form, which the newer key names.
    fields.skip("hidden_act")
    result = ModelConfig(family="gemma", **gemma(fields, kv_heads=16))
    fields.finish()
    return result


def gemma(
    fields: Fields, *, kv_heads: int, rope_theta: float = 10000.0, max_positions: int = 8192
) -> dict[str, Any]:
    """The fields of ModelConfig that all Gemmas write alike."""
    bias = fields.flag("attention_bias", False)
    read = common(fields, max_positions=max_positions, kv_heads=kv_heads, head_dim=256, rope_theta=rope_theta)
    return read | {
        "activation": fields.activation("hidden_activation", default="gelu_pytorch_tanh"),
        "embedding_scale": read["hidden_size"] ** 0.5,
        "norm_plus_one": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "tied_embeddings": fields.flag("tie_word_embeddings", True),
    }
