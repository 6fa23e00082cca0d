"""OLMo 2: Llama with norms behind attention and feed-forward instead of before, and over all queries and all keys.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names
from .llama import common

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(
    attn_norm="",
    attn_post_norm="post_attention_layernorm",
    mlp_norm="",
    mlp_post_norm="post_feedforward_layernorm",
).table()


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    bias = fields.flag("attention_bias", False)
    result = ModelConfig(
        family="olmo2",
        pre_norms=False,
        post_norms=True,
        qk_norm="row",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        **common(fields, max_positions=2048, norm_eps_default=1e-5),
    )
    fields.finish()
    return result
