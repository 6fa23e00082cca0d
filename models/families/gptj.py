"""GPT-J: attention and feed-forward side by side behind one norm, neighbouring pairs of a part of a head rotate.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .gpt import gpt, renamed
from .hf import Fields
from .hf_names import Names

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = Names(
    layer="transformer.h.{i}.",
    embed="transformer.wte",
    attn_norm="ln_1",
    queries_keys_values=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    out="attn.out_proj",
    up="mlp.fc_in",
    down="mlp.fc_out",
    norm="transformer.ln_f",
).table()
IGNORED_TENSORS = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight")


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(renamed(config))
    fields.skip("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
    fields.skip("summary_first_dropout", "rotary", "scale_attn_weights", "n_ctx")
    width = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    rotary_dim = fields.integer("rotary_dim", 64) if config.get("rotary_dim", 64) else width
    result = ModelConfig(
        family="gptj",
        parallel=True,
        shared_norm=True,
        rope_interleaved=True,
        mlp_bias=True,
        head_bias=True,
        **gpt(
            fields,
            activation_key="activation_function",
            activation="gelu_new",
            max_positions=2048,
            rope_theta=10000.0,
            rotary_dim=None if rotary_dim == width else rotary_dim,
            tied=False,
        ),
    )
    fields.finish()
    return result
