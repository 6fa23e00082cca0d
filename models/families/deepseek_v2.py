"""DeepSeek-V2, V2-Lite and Coder-V2: keys and values in latent form (MLA), experts in groups beside shared ones.

Knows config.json's keys, transformers' defaults for them, and what the published code does where transformers does less.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..config import Experts, Latent, ModelConfig
from ..weights import either, plain
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names, experts
from .llama import common
from .moe import skip_training

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

_ATTENTION = "model.layers.{i}.self_attn."
_LATENT = {
    "q.weight": either(plain(_ATTENTION + "q_proj.weight", 2), plain(_ATTENTION + "q_b_proj.weight", 2)),
    "q_down.weight": plain(_ATTENTION + "q_a_proj.weight"),
    "q_down.bias": plain(_ATTENTION + "q_a_proj.bias"),
    "q_norm.scale": plain(_ATTENTION + "q_a_layernorm.weight"),
    "down.weight": plain(_ATTENTION + "kv_a_proj_with_mqa.weight"),
    "down.bias": plain(_ATTENTION + "kv_a_proj_with_mqa.bias"),
    "norm.scale": plain(_ATTENTION + "kv_a_layernorm.weight"),
    "up": plain(_ATTENTION + "kv_b_proj.weight", 2),
}
WEIGHTS = {
    **Names().table(),
    **{f"layers.{{i}}.latent.{path}": recipe for path, recipe in _LATENT.items()},
    **experts(
        "mlp.gate",
        ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
        "mlp.experts.{e}.down_proj",
        shared="mlp.shared_experts",
    ),
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    skip_training(fields)
    fields.one_of("scoring_func", fields.text("scoring_func", default="softmax"), "softmax")
    # Releases disagree about what it then means.
    fields.one_of("norm_topk_prob", fields.flag("norm_topk_prob", False), False)
    method = fields.text("topk_method", default="greedy")
    fields.one_of("topk_method", method, "greedy", "group_limited_greedy")
    in_groups = method == "group_limited_greedy"
    fields.skip("n_group", "topk_group")
    result = ModelConfig(
        family="deepseek_v2",
        experts=routed(
            fields,
            normalized=False,
            groups=fields.integer("n_group") if in_groups else 1,
            chosen_groups=fields.integer("topk_group") if in_groups else 1,
        ),
        mlp_bias=fields.flag("mlp_bias", False),
        **latent(fields, max_positions=2048),
    )
    fields.finish()
    return result


def latent(fields: Fields, *, max_positions: int) -> dict[str, Any]:
    """The fields of ModelConfig that attention in latent form makes, and those of all families."""
    shape = Latent(
        rank=fields.integer("kv_lora_rank", 512),
        rotary=fields.integer("qk_rope_head_dim", 64),
        still=fields.integer("qk_nope_head_dim", 128),
        value=fields.integer("v_head_dim", 128),
        query_rank=fields.optional_integer("q_lora_rank") or 0,
    )
    # What follows from the above; keys that say nothing about the network.
    fields.skip("head_dim", "qk_head_dim", "num_key_value_heads", "auto_map", "ep_size")
    head_dim, bias = shape.rank + shape.rotary, fields.flag("attention_bias", False)
    usual = common(fields, max_positions=max_positions, head_dim=head_dim, rotary_dim=shape.rotary)
    return usual | {
        "latent": shape,
        "kv_heads": 1,
        "head_dim": head_dim,
        "attention_scale": _score_factor(fields) / math.sqrt(shape.still + shape.rotary),
        "rope_interleaved": fields.flag("rope_interleave", True),
        "qkv_bias": bias,
        "output_bias": bias,
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
    }


def _score_factor(fields: Fields) -> float:
    """What yarn multiplies scores by, beside what it does to what rotates: `mscale_all_dim`, of queries and of keys. Called when
    these are known to be numbers. transformers leaves it out in V2, the published code does not."""
    rope = fields.table("rope_scaling") or fields.table("rope_parameters")
    factor, weight = rope.get("factor") or 1.0, rope.get("mscale_all_dim") or 0.0
    return (0.1 * weight * math.log(factor) + 1.0) ** 2 if factor > 1 else 1.0


def routed(
    fields: Fields, *, dense: int = 0, size: int = 1407, shared: int = 2, scale: float = 1.0, **how: Any
) -> Experts | None:
    """The layers of experts; None where `n_routed_experts` is null. `how` is what a token's are chosen by, the others are
    defaults."""
    layers = fields.integer("num_hidden_layers")
    first, step = fields.whole("first_k_dense_replace", dense), fields.integer("moe_layer_freq", 1)
    fields.skip("aux_loss_alpha", "seq_aux")
    count = fields.optional_integer("n_routed_experts")
    size, shared = fields.integer("moe_intermediate_size", size), fields.whole("n_shared_experts", shared)
    chosen, scale = (
        fields.optional_integer("num_experts_per_tok"),
        fields.number("routed_scaling_factor", scale),
    )
    if count is None:
        return None
    if chosen is None:
        raise fields.refusal(
            "num_experts_per_tok", None, "a model with experts must say how many a token takes"
        )
    groups, few = how["groups"], how["chosen_groups"]
    if count % groups or few > groups or chosen > few * (count // groups):
        why = f"{count} experts, of which {chosen} are chosen out of {few} groups, do not fit that"
        raise fields.refusal("n_group", groups, why)
    sparse = tuple(layer >= first and layer % step == 0 for layer in range(layers))
    return Experts(
        count=count,
        chosen=chosen,
        ffn_size=size,
        shared_ffn_size=size * shared,
        share_scale=scale,
        wide_router=True,
        layers=() if all(sparse) else sparse,
        **how,
    )
