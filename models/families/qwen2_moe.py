"""Qwen 1.5 and 2 with experts: Qwen 2 with a feed-forward for every token beside the experts, through a gate.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import Experts, ModelConfig
from ..errors import UnsupportedModel
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names, experts
from .llama import common
from .moe import skip_training, sparse_layers

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

GATES = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj")
WEIGHTS = {
    **Names().table(),
    **experts("mlp.gate", GATES, "mlp.experts.{e}.down_proj", shared="mlp.shared_expert"),
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    skip_training(fields)
    if fields.flag("use_sliding_window", False):
        raise UnsupportedModel(
            "config.json: use_sliding_window = True is not supported in Qwen 2 with experts"
        )
    fields.skip("sliding_window", "max_window_layers", "layer_types")
    result = ModelConfig(
        family="qwen2_moe",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=fields.flag("qkv_bias", True),
        experts=Experts(
            count=fields.integer("num_experts", 60),
            chosen=fields.integer("num_experts_per_tok", 4),
            ffn_size=fields.integer("moe_intermediate_size", 1408),
            normalized=fields.flag("norm_topk_prob", False),
            shared_ffn_size=fields.integer("shared_expert_intermediate_size", 5632),
            shared_gate=True,
            layers=sparse_layers(fields),
        ),
        **common(fields, max_positions=32768, kv_heads=16, ffn_size=5632),
    )
    fields.finish()
    return result
