"""MPT: ALiBi instead of positions, no biases at all.

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
    layer="transformer.blocks.{i}.",
    embed="transformer.wte",
    attn_norm="norm_1",
    mlp_norm="norm_2",
    queries_keys_values=("attn.Wqkv",),
    out="attn.out_proj",
    up="ffn.up_proj",
    down="ffn.down_proj",
    norm="transformer.norm_f",
).table()

OWN_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
}
UNREAD = ("attn_impl", "attn_pdrop", "attn_uses_sequence_id", "output_attentions")


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(renamed(config, OWN_NAMES))
    attention = fields.mapping("attn_config") or Fields({})
    attention.skip(*UNREAD)
    for key, only in (("alibi", True), ("prefix_lm", False), ("qk_ln", False)):
        if attention.flag(key, only) is not only:
            raise UnsupportedModel(f"config.json: attn_config: {key} = {not only} is not supported")
    if (kind := attention.text("attn_type", default="multihead_attention")) != "multihead_attention":
        raise UnsupportedModel(f"config.json: attn_config: attn_type = {kind!r} is not supported")
    if not fields.flag("no_bias", True):
        raise UnsupportedModel("config.json: no_bias = False is not supported")
    # transformers reads none of these, nor the code that the first releases brought along.
    fields.skip("init_device", "verbose", "embedding_fraction", "norm_type", "learned_pos_emb", "emb_pdrop")
    fields.skip("init_config", "expansion_ratio", "attn_impl", "auto_map")
    read = gpt(fields, activation_key="activation", activation="gelu", max_positions=2048)
    most = attention.number("alibi_bias_max", 8.0)
    read["norm_bias"] = False
    result = ModelConfig(
        family="mpt",
        alibi_slopes=alibi_slopes(read["heads"], most),
        attention_scale=attention.optional_number("softmax_scale"),
        qkv_clip=attention.optional_number("clip_qkv"),
        **read,
    )
    attention.finish()
    fields.finish()
    return result
