"""GPT-NeoX and Pythia: attention and feed-forward side by side behind a norm each, a quarter of a head rotates.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .gpt import gpt, renamed
from .hf import Fields
from .hf_names import Names
from .llama import rotary_width

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(
    layer="gpt_neox.layers.{i}.",
    embed="gpt_neox.embed_in",
    queries_keys_values=("attention.query_key_value",),
    by_head=True,
    out="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
).table()
IGNORED_TENSORS = (
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    r"gpt_neox\.rotary_emb\.inv_freq",
    r"embed_out\.weight",
)


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(renamed(config, {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}))
    bias = fields.flag("attention_bias", True)
    result = ModelConfig(
        family="gpt_neox",
        parallel=fields.flag("use_parallel_residual", True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        **gpt(
            fields,
            activation_key="hidden_act",
            activation="gelu",
            max_positions=2048,
            norm_eps="layer_norm_eps",
            rope_theta=10000.0,
            rotary_dim=rotary_width(fields, 0.25),
            tied=False,
        ),
    )
    fields.finish()
    return result
