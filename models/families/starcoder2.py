"""StarCoder 2: Llama with LayerNorms, biases, and a feed-forward without a gate.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .gpt import gpt
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(up="mlp.c_fc", down="mlp.c_proj").table()


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    bias = fields.flag("use_bias", True)
    result = ModelConfig(
        family="starcoder2",
        window=fields.optional_integer("sliding_window"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        **gpt(
            fields,
            activation_key="hidden_act",
            activation="gelu_pytorch_tanh",
            max_positions=4096,
            norm_eps="norm_epsilon",
            kv_heads=2,
            rope_theta=10000.0,
        ),
    )
    fields.skip("mlp_type", "norm_type")  # marks of the first release, which nothing reads
    fields.finish()
    return result
