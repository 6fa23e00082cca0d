"""The parameter specs of a decoder, written out by hand from `spec.py`'s docstring: a witness that needs no decoder."""

from xlane.models.config import ModelConfig
from xlane.models.spec import ParamSpec


def specs_by_hand(config: ModelConfig, dtype: str = "float32", packed: bool = False) -> list[ParamSpec]:
    """Every parameter of a model of this configuration. `packed` makes its weights panels, the embedding excepted."""
    d, h, k, f, v = config.hidden_size, config.head_dim, config.kv_heads, config.ffn_size, config.vocab_size
    parts = config.heads // k + 2
    found: list[ParamSpec] = []

    def add(path: str, shape: tuple[int, ...], wanted: bool = True) -> None:
        panels = packed and path.endswith(".weight") and path != "embed.weight"
        if wanted:
            found.append(ParamSpec(path, shape, dtype, (None,) * len(shape), panels))

    add("embed.weight", (v, d))
    for layer in range(config.layers):
        at = f"layers.{layer}"
        add(f"{at}.attn_norm.scale", (d,))
        add(f"{at}.qkv.weight", (k, parts, h, d))
        add(f"{at}.qkv.bias", (k, parts, h), config.qkv_bias)
        add(f"{at}.q_norm.scale", (h,), config.qk_norm is not None)
        add(f"{at}.k_norm.scale", (h,), config.qk_norm is not None)
        add(f"{at}.out.weight", (d, config.heads * h))
        add(f"{at}.out.bias", (d,), config.output_bias)
        add(f"{at}.mlp_norm.scale", (d,))
        add(f"{at}.gate_up.weight", (2, f, d))
        add(f"{at}.gate_up.bias", (2, f), config.mlp_bias)
        add(f"{at}.down.weight", (d, f))
        add(f"{at}.down.bias", (d,), config.mlp_bias)
    add("norm.scale", (d,))
    add("head.weight", (v, d), not config.tied_embeddings)
    return found
