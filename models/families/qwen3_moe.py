"""Qwen 3 with experts (30B-A3B, 235B-A22B): a norm over each head of queries and keys, no feed-forward for every token.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import Experts, ModelConfig
from .gpt import renamed
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names, experts
from .llama import common
from .moe import skip_training, sparse_layers
from .qwen2_moe import GATES

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = {**Names().table(), **experts("mlp.gate", GATES, "mlp.experts.{e}.down_proj")}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    # transformers 5 has one name for all families' experts.
    fields = Fields(renamed(config, {"num_local_experts": "num_experts"}))
    skip_training(fields)
    bias = fields.flag("attention_bias", False)
    # Unlike in Qwen 3 without experts, a window is over all layers.
    window = fields.integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    fields.skip("sliding_window", "max_window_layers")
    # Marks of the first release, of what this family always has or never.
    fields.one_of("use_qk_norm", fields.flag("use_qk_norm", True), True)
    fields.one_of("qkv_bias", fields.flag("qkv_bias", False), False)
    fields.one_of("shared_expert_intermediate_size", fields.whole("shared_expert_intermediate_size", 0), 0)
    result = ModelConfig(
        family="qwen3_moe",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        window=window,
        experts=Experts(
            count=fields.integer("num_experts", 128),
            chosen=fields.integer("num_experts_per_tok", 8),
            ffn_size=fields.integer("moe_intermediate_size", 768),
            normalized=fields.flag("norm_topk_prob", False),
            layers=sparse_layers(fields),
        ),
        **common(fields, max_positions=32768, kv_heads=4, ffn_size=6144),
    )
    fields.finish()
    return result
