"""OLMo 1: Llama with LayerNorms that have no parameters; queries, keys and values may be clipped.

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
    bias = fields.flag("attention_bias", False)
    result = ModelConfig(
        family="olmo",
        norm="layer",
        norm_scale=False,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        qkv_clip=fields.optional_number("clip_qkv"),
        **common(fields, max_positions=2048, norm_eps=None, norm_eps_default=1e-5),
    )
    fields.finish()
    return result
