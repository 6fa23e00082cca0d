"""OPT: learned positions behind two spare rows, ReLU, norms before attention and feed-forward.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .gpt import gpt, renamed
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(
    layer="model.decoder.layers.{i}.",
    embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    attn_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
    norm="model.decoder.final_layer_norm",
).table()

SPARE_ROWS = 2
"""Of the table of positions, before the first."""


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(renamed(config, {"ffn_dim": "intermediate_size"}))
    hidden = fields.integer("hidden_size")
    if (width := fields.integer("word_embed_proj_dim", hidden)) != hidden:
        raise UnsupportedModel(
            f"config.json: word_embed_proj_dim = {width} is not supported; hidden_size = {hidden} is expected"
        )
    if not fields.flag("do_layer_norm_before", True) or fields.flag("_remove_final_layer_norm", False):
        raise UnsupportedModel(
            "config.json: do_layer_norm_before = False and _remove_final_layer_norm = True are not supported"
        )
    bias, affine = fields.flag("enable_bias", True), fields.flag("layer_norm_elementwise_affine", True)
    read = gpt(
        fields,
        activation_key="activation_function",
        activation="relu",
        max_positions=2048,
        norm_eps=None,
    )
    read["norm_bias"] = affine
    result = ModelConfig(
        family="opt",
        learned_positions=read["max_positions"] + SPARE_ROWS,
        position_offset=SPARE_ROWS,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_scale=affine,
        **read,
    )
    fields.skip("init_std", "activation_dropout")
    fields.finish()
    return result
