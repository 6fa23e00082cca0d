"""SantaCoder as it was published first: gpt_bigcode in GPT-2's layout, with queries in a tensor of their own.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from . import gpt_bigcode
from .gpt2 import IGNORED_TENSORS
from .hf import Fields
from .hf_names import Names

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(
    layer="transformer.h.{i}.",
    embed="transformer.wte",
    positions="transformer.wpe",
    attn_norm="ln_1",
    mlp_norm="ln_2",
    queries_keys_values=("attn.q_attn", "attn.kv_attn"),
    out="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="transformer.ln_f",
    transposed=True,
).table()
OWN_KEYS = ("attention_head_type", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "auto_map")
"""What gpt_bigcode has no key for; of the code that came with it transformers has the like."""


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    own = Fields(config)
    own.one_of("attention_head_type", own.text("attention_head_type", default="multiquery"), "multiquery")
    inverse = own.flag("scale_attn_by_inverse_layer_idx", False)
    own.one_of("scale_attn_by_inverse_layer_idx", inverse, False)
    rest = {key: value for key, value in config.items() if key not in OWN_KEYS}
    return replace(gpt_bigcode.config_from_hf(rest), family="santacoder")
