"""Command R and R+ (Cohere): attention and feed-forward side by side behind one LayerNorm without bias, neighbouring pairs
rotate, logits are scaled.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..weights import plain
from .hf import Fields
from .hf_names import IGNORED_TENSORS
from .hf_names import WEIGHTS as LLAMA
from .llama import common

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

# A scale for each head.
WEIGHTS = {**LLAMA} | {
    f"layers.{{i}}.{which}_norm.scale": plain(f"model.layers.{{i}}.self_attn.{which}_norm.weight", 2)
    for which in "qk"
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    bias = fields.flag("attention_bias", False)
    result = ModelConfig(
        family="cohere",
        norm="layer",
        parallel=True,
        shared_norm=True,
        rope_interleaved=True,
        qk_norm="each_head" if fields.flag("use_qk_norm", False) else None,
        qkv_bias=bias,
        output_bias=bias,
        logits_scale=fields.number("logit_scale", 0.0625),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        **common(fields, max_positions=8192, norm_eps="layer_norm_eps", norm_eps_default=1e-5),
    )
    fields.finish()
    return result
