"""BLOOM: ALiBi instead of positions, a norm over the embeddings.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .gpt import alibi_slopes, gpt, renamed
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(
    layer="transformer.h.{i}.",
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    queries_keys_values=("self_attention.query_key_value",),
    by_head=True,
    out="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norm="transformer.ln_f",
).table()

OWN_NAMES = {
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "seq_length": "max_position_embeddings",
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(renamed(config, OWN_NAMES))
    if fields.flag("apply_residual_connection_post_layernorm", False):
        raise UnsupportedModel(
            "config.json: apply_residual_connection_post_layernorm = True is not supported"
        )
    # How it was trained, and how its authors computed.
    fields.skip("slow_but_exact", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion")
    fields.skip("skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "n_inner", "unk_token_id")
    result = ModelConfig(
        family="bloom",
        alibi_slopes=alibi_slopes(fields.integer("num_attention_heads")),
        embedding_norm=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        # The architecture fixes the activation.
        **gpt(fields, activation_key="activation", activation="gelu_new", max_positions=2048),
    )
    fields.finish()
    return result
