"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections; part of a head may stand still, and longrope stretches the context.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names
from .llama import common, rotary_width

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(queries_keys_values=("self_attn.qkv_proj",), gates=("mlp.gate_up_proj",)).table()


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    # The first releases brought code of their own, which transformers has long since taken in.
    fields.skip("auto_map")
    bias = fields.flag("attention_bias", False)
    result = ModelConfig(
        family="phi3",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        window=fields.optional_integer("sliding_window"),
        qkv_bias=bias,
        output_bias=bias,
        **common(
            fields,
            max_positions=4096,
            rotary_dim=rotary_width(fields, 1.0),
            norm_eps_default=1e-5,
        ),
    )
    fields.finish()
    return result
