"""Phi 1, 1.5 and 2: attention and feed-forward side by side behind one LayerNorm, biases everywhere, half of a head rotates.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names
from .llama import common, rotary_width

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(out="self_attn.dense", up="mlp.fc1", down="mlp.fc2", norm="model.final_layernorm").table()


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    # The first releases brought code of their own, which transformers has long since taken in.
    fields.skip("auto_map")
    if fields.flag("qk_layernorm", False):
        raise UnsupportedModel("config.json: qk_layernorm = True is not supported for Phi")
    result = ModelConfig(
        family="phi",
        norm="layer",
        norm_bias=True,
        parallel=True,
        shared_norm=True,
        qkv_bias=True,
        output_bias=True,
        gated=False,
        activation=fields.activation("hidden_act", default="gelu_new"),
        mlp_bias=True,
        head_bias=True,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        **common(
            fields,
            max_positions=2048,
            rotary_dim=rotary_width(fields, 0.5),
            norm_eps="layer_norm_eps",
            norm_eps_default=1e-5,
        ),
    )
    fields.finish()
    return result
