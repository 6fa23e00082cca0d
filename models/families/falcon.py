"""Falcon: 7B (one key and value head), 40B and 180B (several, a norm for each branch), falcon-rw (ALiBi).

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..weights import either, plain
from .gpt import alibi_slopes, gpt, renamed
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

_NAMES = Names(
    layer="transformer.h.{i}.",
    embed="transformer.word_embeddings",
    queries_keys_values=("self_attention.query_key_value",),
    by_head=True,
    out="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norm="transformer.ln_f",
).table()
WEIGHTS = {**_NAMES} | {
    f"layers.{{i}}.{branch}_norm.{path}": either(
        plain(f"transformer.h.{{i}}.ln_{branch}.{kind}"), _NAMES[f"layers.{{i}}.{branch}_norm.{path}"]
    )
    for branch in ("attn", "mlp")
    for path, kind in (("scale", "weight"), ("bias", "bias"))
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(
        renamed(config, {"ffn_hidden_size": "intermediate_size", "num_kv_heads": "num_key_value_heads"})
    )
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    newer, one_head = fields.flag("new_decoder_architecture", False), fields.flag("multi_query", True)
    alibi, bias = fields.flag("alibi", False), fields.flag("bias", False)
    parallel = fields.flag("parallel_attn", True) or newer
    norms = fields.integer("num_ln_in_parallel_attn", 2 if newer else 1)
    # The first releases brought code of their own, which transformers has long since taken in.
    fields.skip("auto_map")
    read = gpt(
        fields,
        activation_key="activation",
        activation="gelu",
        max_positions=2048,
        rope_theta=None if alibi else 10000.0,
    )
    if alibi:
        fields.skip("rope_theta", "rope_parameters")
    scale = (hidden // heads) ** -0.5
    read["kv_heads"] = read["kv_heads"] if newer else 1 if one_head else heads
    result = ModelConfig(
        family="falcon",
        # Here what distance costs is scaled as scores are.
        alibi_slopes=tuple(slope * scale for slope in alibi_slopes(heads)) if alibi else (),
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        **read,
    )
    fields.finish()
    return result
