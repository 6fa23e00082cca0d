"""GPT-2: learned positions, biases everywhere, linear maps stored inputs first.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .gpt import gpt, renamed
from .hf import Fields
from .hf_names import Names

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(
    layer="transformer.h.{i}.",
    embed="transformer.wte",
    positions="transformer.wpe",
    attn_norm="ln_1",
    mlp_norm="ln_2",
    queries_keys_values=("attn.c_attn",),
    out="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="transformer.ln_f",
    transposed=True,
).table()
IGNORED_TENSORS = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight")

SUMMARY = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)
"""Of a head that sums a text up, not of this one."""


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(renamed(config))
    # How the products are ordered and rounded, and a second name of the context.
    fields.skip(*SUMMARY, "reorder_and_upcast_attn", "n_ctx")
    if not fields.flag("scale_attn_weights", True) or fields.flag("scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModel(
            "config.json: scale_attn_weights = False and scale_attn_by_inverse_layer_idx = True are not supported"
        )
    positions = fields.integer("max_position_embeddings", 1024)
    result = ModelConfig(
        family="gpt2",
        learned_positions=positions,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        **gpt(fields, activation_key="activation_function", activation="gelu_new", max_positions=1024),
    )
    fields.finish()
    return result
