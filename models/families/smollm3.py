"""SmolLM3: Llama in which every fourth layer uses no rotary positions, and those layers may slide a window.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .hf import Fields
from .hf_names import IGNORED_TENSORS, WEIGHTS
from .llama import common, windows

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    bias = fields.flag("attention_bias", False)
    rotates = _rotating_layers(fields)
    window, window_layers = _sliding(fields, rotates)
    result = ModelConfig(
        family="smollm3",
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        rope_layers=() if all(rotates) else rotates,
        window=window,
        window_layers=window_layers,
        **common(fields, max_positions=32768, kv_heads=4, rope_theta=2000000.0),
    )
    fields.finish()
    return result


def _rotating_layers(fields: Fields) -> tuple[bool, ...]:
    layers = fields.integer("num_hidden_layers")
    interval = fields.integer("no_rope_layer_interval", 4)
    # Despite its name, 1 in `no_rope_layers` marks a layer that does rotate.
    marks = fields.per_layer("no_rope_layers", layers)
    if marks is None:
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if any(mark not in (0, 1) for mark in marks):
        raise UnsupportedModel(f"config.json: no_rope_layers = {list(marks)}: only 0 and 1 are expected")
    return tuple(bool(mark) for mark in marks)


def _sliding(fields: Fields, rotates: tuple[bool, ...]) -> tuple[int | None, tuple[bool, ...]]:
    types = fields.per_layer("layer_types", len(rotates))
    # The published configuration carries Qwen's key, which this architecture never reads.
    fields.skip("max_window_layers")
    if not fields.flag("use_sliding_window", False):
        fields.skip("sliding_window")
        windows(None, types)
        return None, ()
    if types is None:
        types = tuple("full_attention" if rotate else "sliding_attention" for rotate in rotates)
    return windows(fields.optional_integer("sliding_window"), types)
