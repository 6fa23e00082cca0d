"""Llama 1 to 3.3, SmolLM2 and what else calls itself LlamaForCausalLM. The other families start from its reading.

Knows config.json's keys and transformers' defaults for them; the network itself is `ModelConfig` and the decoder.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .hf import Fields
from .hf_names import IGNORED_TENSORS, WEIGHTS
from .hf_rope import Rope

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    bias = fields.flag("attention_bias", False)
    result = ModelConfig(
        family="llama",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        **common(fields, max_positions=2048),
    )
    fields.finish()
    return result


def common(
    fields: Fields,
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    ffn_size: int | None = None,
    rope_theta: float | None = 10000.0,
    rotary_dim: int | None = None,
    norm_eps: str | None = "rms_norm_eps",
    norm_eps_default: float = 1e-6,
) -> dict[str, Any]:
    """The fields of ModelConfig that all these families write alike; the arguments are a family's own defaults. `norm_eps` is
    the key's name, None where no key says it; `rope_theta` None is for models that do not rotate."""
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if not (head_dim := fields.optional_integer("head_dim") or head_dim):
        head_dim = _divide("hidden_size", hidden, "num_attention_heads", heads)
    kv_heads = fields.integer("num_key_value_heads", kv_heads or heads)
    _divide("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    context = fields.integer("max_position_embeddings", max_positions)
    width = rotary_dim or head_dim
    rope = (
        Rope(fields, rope_theta, head_dim=head_dim, width=width, max_positions=context)
        if rope_theta
        else None
    )
    bos = fields.ids("bos_token_id")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "layers": fields.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_size": fields.integer("intermediate_size", ffn_size),
        "max_positions": rope.max_positions if rope else context,
        "norm_eps": fields.number(norm_eps, norm_eps_default) if norm_eps else norm_eps_default,
        "rotary_dim": rotary_dim,
        "rope_theta": rope.theta if rope else None,
        "rope_scaling": rope.scaling if rope else None,
        "rope_linear_factor": rope.linear_factor if rope else 1.0,
        "bos_id": bos[0] if bos else None,
        "eos_ids": fields.ids("eos_token_id"),
    }


def rotary_width(fields: Fields, fraction: float, key: str = "partial_rotary_factor") -> int | None:
    """How many dimensions of a head rotate; None if all do. `fraction` is the family's default. transformers 5 writes it beside
    the frequencies."""
    head_dim = fields.optional_integer("head_dim")
    head_dim = head_dim or fields.integer("hidden_size") // fields.integer("num_attention_heads")
    width = int(head_dim * fields.number(key, fields.table("rope_parameters").get(key) or fraction))
    return None if width == head_dim else width


def windows(window: int | None, layer_types: tuple[Any, ...] | None) -> tuple[int | None, tuple[bool, ...]]:
    """ModelConfig's `window` and `window_layers` out of transformers' names for each layer's attention."""
    for kind in layer_types or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"config.json: layer_types has {kind!r}; supported are 'full_attention' and 'sliding_attention'"
            )
    slides = tuple(kind == "sliding_attention" for kind in layer_types or ())
    if window is None or not any(slides):
        return None, ()
    return window, () if all(slides) else slides


def _divide(name: str, value: int, by_name: str, by: int) -> int:
    if value % by:
        raise UnsupportedModel(f"config.json: {name} = {value} is not a multiple of {by_name} = {by}")
    return value // by
