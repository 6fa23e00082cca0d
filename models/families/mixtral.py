"""Mixtral 8x7B and 8x22B: Mistral with experts, of which each token takes two.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import Experts, ModelConfig
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names, experts
from .llama import common
from .moe import skip_training

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

EXPERTS = experts(
    "block_sparse_moe.gate",
    ("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),
    "block_sparse_moe.experts.{e}.w2",
)
WEIGHTS = {**Names().table(), **EXPERTS}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    skip_training(fields)
    result = ModelConfig(
        family="mixtral",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        window=fields.optional_integer("sliding_window"),
        experts=Experts(
            count=fields.integer("num_local_experts", 8),
            chosen=fields.integer("num_experts_per_tok", 2),
            ffn_size=fields.integer("intermediate_size", 14336),
        ),
        **common(fields, max_positions=4096 * 32, kv_heads=8, rope_theta=1e6, norm_eps_default=1e-5),
    )
    fields.finish()
    return result
