"""What the families in GPT-2's line share: LayerNorms with biases, a feed-forward without a gate, often their own names for
config.json's keys, often no rotation. Knows no architecture by itself."""

from collections.abc import Mapping
from typing import Any

from .hf import Fields
from .llama import common

OWN_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}


def renamed(config: Mapping[str, Any], names: Mapping[str, str] = OWN_NAMES) -> dict[str, Any]:
    """The configuration under the names that the other families use; of two names for one thing, the family's own wins."""
    own = {new: config[old] for old, new in names.items() if config.get(old) is not None}
    return {key: value for key, value in config.items() if key not in names} | own


def gpt(
    fields: Fields,
    *,
    activation_key: str,
    activation: str,
    max_positions: int,
    norm_eps: str | None = "layer_norm_epsilon",
    kv_heads: int | None = None,
    rope_theta: float | None = None,
    rotary_dim: int | None = None,
    tied: bool = True,
) -> dict[str, Any]:
    """The fields of ModelConfig that these families write alike; the arguments are a family's own names and defaults."""
    return common(
        fields,
        max_positions=max_positions,
        kv_heads=kv_heads,
        ffn_size=4 * fields.integer("hidden_size"),
        rope_theta=rope_theta,
        rotary_dim=rotary_dim,
        norm_eps=norm_eps,
        norm_eps_default=1e-5,
    ) | {
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "activation": fields.activation(activation_key, default=activation),
        "tied_embeddings": fields.flag("tie_word_embeddings", tied),
    }


def alibi_slopes(heads: int, most: float = 8.0) -> tuple[float, ...]:
    """What a score loses a token of distance, by head (Press et al. 2021): the powers 2^(-most i / n) for n heads, i = 1 … n;
    where n is no power of two, those of the next one, every second first."""
    count = 1 << (heads - 1).bit_length()
    powers = [2.0 ** (-most * i / count) for i in range(1, count + 1)]
    return tuple(powers if count == heads else (powers[1::2] + powers[::2])[:heads])
