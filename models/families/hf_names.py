"""What each parameter of the decoder is made of in a Hugging Face checkpoint: tables from a few names. Data."""

from collections.abc import Mapping

from ..weights import Recipe, gate_up, plain, qkv


def table(
    *,
    layer: str = "model.layers.{i}.",
    embed: str = "model.embed_tokens",
    positions: str = "",
    embed_norm: str = "",
    attn_norm: str = "input_layernorm",
    attn_post_norm: str = "",
    mlp_norm: str = "post_attention_layernorm",
    mlp_post_norm: str = "",
    queries_keys_values: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    by_head: bool = False,
    out: str = "self_attn.o_proj",
    gates: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj"),
    up: str = "",
    down: str = "mlp.down_proj",
    norm: str = "model.norm",
    head: str = "lm_head",
    transposed: bool = False,
) -> Mapping[str, Recipe]:
    """Parameter path to recipe, for weights and biases (norms: scales and biases). A model uses those it has.

    `layer` is what the names of a layer's tensors begin with. `queries_keys_values` are three tensors, or one that has them
    below each other, for all heads or (`by_head`) for every kv head. `gates` are the gate and what it multiplies, or one
    tensor with both; `up` is the first projection of a feed-forward without a gate. `transposed`: linear maps are stored
    inputs first.
    """
    found: dict[str, Recipe] = {}
    for path, name in (("embed", embed), ("positions", positions), ("head", head)):
        if name:
            found |= {f"{path}.{kind}": plain(f"{name}.{kind}") for kind in ("weight", "bias")}
    in_layer = "layers.{i}."
    norms = {
        "embed_norm": embed_norm,
        "norm": norm,
        in_layer + "attn_norm": attn_norm and layer + attn_norm,
        in_layer + "attn_post_norm": attn_post_norm and layer + attn_post_norm,
        in_layer + "mlp_norm": mlp_norm and layer + mlp_norm,
        in_layer + "mlp_post_norm": mlp_post_norm and layer + mlp_post_norm,
        in_layer + "q_norm": layer + "self_attn.q_norm",
        in_layer + "k_norm": layer + "self_attn.k_norm",
    }
    for path, name in norms.items():
        if name:
            found |= {f"{path}.scale": plain(f"{name}.weight"), f"{path}.bias": plain(f"{name}.bias")}
    for kind in ("weight", "bias"):
        names = tuple(f"{layer}{name}.{kind}" for name in queries_keys_values)
        turned = transposed and kind == "weight"
        found |= {
            f"{in_layer}qkv.{kind}": plain(names[0], 3) if by_head else qkv(*names, transposed=turned),
            f"{in_layer}out.{kind}": plain(f"{layer}{out}.{kind}", transposed=turned),
            f"{in_layer}gate_up.{kind}": gate_up(*(f"{layer}{name}.{kind}" for name in gates)),
            f"{in_layer}up.{kind}": plain(f"{layer}{up}.{kind}", transposed=turned),
            f"{in_layer}down.{kind}": plain(f"{layer}{down}.{kind}", transposed=turned),
        }
    return found


WEIGHTS = table()
"""Llama's names, which many families use."""

# Tensors that a checkpoint may hold for nothing: frequencies that follow from the configuration, and the head when it
# is the embedding (an untied model has a parameter made of it, and misses it if it is not there).
IGNORED_TENSORS = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
    r"lm_head\.weight",
)
