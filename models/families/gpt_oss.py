"""gpt-oss: experts with biases and a gate of their own, sinks, a window in every other layer, yarn; MXFP4 is dequantised.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import Experts, ModelConfig
from ..weights import alternating, plain
from .hf import Fields
from .hf_names import IGNORED_TENSORS, Names
from .llama import common, windows
from .moe import skip_training

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

_LAYER, _EXPERTS = "model.layers.{i}.", "model.layers.{i}.mlp.experts."
WEIGHTS = {
    **Names().table(),
    "layers.{i}.sinks": plain(_LAYER + "self_attn.sinks", 2),
    "layers.{i}.experts.router.weight": plain(_LAYER + "mlp.router.weight"),
    "layers.{i}.experts.router.bias": plain(_LAYER + "mlp.router.bias"),
    "layers.{i}.experts.gate_up.weight": alternating(_EXPERTS + "gate_up_proj", transposed=True),
    "layers.{i}.experts.gate_up.bias": alternating(_EXPERTS + "gate_up_proj_bias"),
    "layers.{i}.experts.down.weight": plain(_EXPERTS + "down_proj", transposed=True),
    "layers.{i}.experts.down.bias": plain(_EXPERTS + "down_proj_bias"),
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    skip_training(fields)
    # Other names of what is read below.
    fields.skip("experts_per_token", "initial_context_length", "hidden_act")
    fields.one_of("swiglu_alpha", fields.number("swiglu_alpha", 1.702), 1.702)
    layers, bias = fields.integer("num_hidden_layers"), fields.flag("attention_bias", True)
    types = fields.per_layer("layer_types", layers) or tuple(
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)
    )
    window, window_layers = windows(fields.integer("sliding_window", 128), types)
    result = ModelConfig(
        family="gpt_oss",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        window=window,
        window_layers=window_layers,
        activation="gelu_sigmoid",
        gate_limit=fields.number("swiglu_limit", 7.0),
        gate_plus_one=True,
        experts=Experts(
            count=fields.integer("num_local_experts", 128),
            chosen=fields.integer("num_experts_per_tok", 4),
            ffn_size=fields.integer("intermediate_size", 2880),
            router_bias=True,
            bias=True,
        ),
        **common(
            fields, max_positions=131072, kv_heads=8, head_dim=64, rope_theta=150000.0, norm_eps_default=1e-5
        ),
    )
    fields.finish()
    return result
