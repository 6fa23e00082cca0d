"""StarCoder and SantaCoder (gpt_bigcode): GPT-2 with one key and value head for all queries.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .gpt import gpt, renamed
from .gpt2 import IGNORED_TENSORS, SUMMARY
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
    by_head=True,
    out="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="transformer.ln_f",
).table()

HOW_IT_RAN = (
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
    "inference_runner",
    "max_batch_size",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "runner_max_sequence_length",
    "validate_runner_input",
    "n_ctx",
)
"""Published configurations tell how their authors computed, not what."""


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(renamed(config))
    fields.skip(*SUMMARY, *HOW_IT_RAN, "num_key_value_heads")
    if not fields.flag("scale_attn_weights", True):
        raise UnsupportedModel("config.json: scale_attn_weights = False is not supported")
    heads = 1 if fields.flag("multi_query", True) else fields.integer("num_attention_heads")
    read = gpt(
        fields,
        activation_key="activation_function",
        activation="gelu_pytorch_tanh",
        max_positions=1024,
    )
    read["kv_heads"] = heads
    result = ModelConfig(
        family="gpt_bigcode",
        learned_positions=read["max_positions"],
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        **read,
    )
    fields.finish()
    return result
