"""Phi-3.5-MoE: LayerNorms, biases, and experts that SparseMixer chooses.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import Experts, ModelConfig
from .hf import Fields
from .hf_names import IGNORED_TENSORS
from .llama import common
from .mixtral import WEIGHTS
from .moe import skip_training

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    # The first release brought code of its own, which transformers has long since taken in.
    fields.skip("auto_map")
    bias, jitter = fields.flag("attention_bias", False), fields.number("router_jitter_noise", 0.01)
    skip_training(fields)
    result = ModelConfig(
        family="phimoe",
        norm="layer",
        norm_bias=True,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        window=fields.optional_integer("sliding_window"),
        qkv_bias=bias,
        output_bias=bias,
        head_bias=fields.flag("lm_head_bias", False),
        experts=Experts(
            count=fields.integer("num_local_experts", 16),
            chosen=fields.integer("num_experts_per_tok", 2),
            ffn_size=fields.integer("intermediate_size", 6400),
            shares="sparsemixer",
            mixer_jitter=jitter,
        ),
        **common(fields, max_positions=4096 * 32, kv_heads=8, rope_theta=1e6, norm_eps_default=1e-5),
    )
    fields.finish()
    return result
