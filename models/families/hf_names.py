"""What each parameter of the decoder is made of in a Hugging Face checkpoint: tables from a few names. Data."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..weights import Recipe, gate_up, plain, qkv


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a family calls the parts of its network; Llama's names, which many use, unless told otherwise. "" where it has
    none."""

    layer: str = "model.layers.{i}."
    """What the names of a layer's tensors begin with; those of its parts follow."""
    embed: str = "model.embed_tokens"
    positions: str = ""
    embed_norm: str = ""
    attn_norm: str = "input_layernorm"
    attn_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = ""
    queries_keys_values: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three tensors, or one that has them below each other."""
    by_head: bool = False
    """That one has them below each other for every kv head, not for all together."""
    out: str = "self_attn.o_proj"
    gates: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The gate and what it multiplies, or one tensor with both."""
    up: str = ""
    """The first projection of a feed-forward without a gate."""
    down: str = "mlp.down_proj"
    norm: str = "model.norm"
    head: str = "lm_head"
    transposed: bool = False
    """Linear maps are stored inputs first."""

    def table(self) -> Mapping[str, Recipe]:
        """Parameter path to recipe, for weights and biases (norms: scales and biases). A model uses those it has."""
        around = {"embed": self.embed, "positions": self.positions, "head": self.head}
        found = {
            f"{path}.{kind}": plain(f"{name}.{kind}")
            for path, name in around.items()
            if name
            for kind in ("weight", "bias")
        }
        return found | self._norms() | self._linear("weight") | self._linear("bias")

    def _norms(self) -> dict[str, Recipe]:
        in_layer = {
            "attn_norm": self.attn_norm,
            "attn_post_norm": self.attn_post_norm,
            "mlp_norm": self.mlp_norm,
            "mlp_post_norm": self.mlp_post_norm,
            "q_norm": "self_attn.q_norm",
            "k_norm": "self_attn.k_norm",
        }
        names = {"embed_norm": self.embed_norm, "norm": self.norm} | {
            f"layers.{{i}}.{path}": name and self.layer + name for path, name in in_layer.items()
        }
        return {
            f"{path}.{ours}": plain(f"{name}.{theirs}")
            for path, name in names.items()
            if name
            for ours, theirs in (("scale", "weight"), ("bias", "bias"))
        }

    def _linear(self, kind: str) -> dict[str, Recipe]:
        fused = tuple(f"{self.layer}{name}.{kind}" for name in self.queries_keys_values)
        turned = self.transposed and kind == "weight"
        found = {
            "qkv": plain(fused[0], 3) if self.by_head else qkv(*fused, transposed=turned),
            "out": plain(f"{self.layer}{self.out}.{kind}", transposed=turned),
            "gate_up": gate_up(*(f"{self.layer}{name}.{kind}" for name in self.gates)),
            "up": plain(f"{self.layer}{self.up}.{kind}", transposed=turned),
            "down": plain(f"{self.layer}{self.down}.{kind}", transposed=turned),
        }
        return {f"layers.{{i}}.{path}.{kind}": recipe for path, recipe in found.items()}


def experts(
    router: str, gates: tuple[str, ...], down: str, shared: str = "", layer: str = "model.layers.{i}."
) -> Mapping[str, Recipe]:
    """The part of a table for layers of experts: names with `{e}` for the expert, and what those of the shared one begin
    with."""
    found = {
        "router.weight": plain(f"{layer}{router}.weight"),
        "gate_up.weight": gate_up(*(f"{layer}{name}.weight" for name in gates)),
        "down.weight": plain(f"{layer}{down}.weight"),
    }
    if shared:
        found |= {
            "shared.gate_up.weight": gate_up(
                *(f"{layer}{shared}.{name}.weight" for name in ("gate_proj", "up_proj"))
            ),
            "shared.down.weight": plain(f"{layer}{shared}.down_proj.weight"),
            "shared_gate.weight": plain(f"{layer}{shared}_gate.weight"),
        }
    return {f"layers.{{i}}.experts.{path}": recipe for path, recipe in found.items()}


WEIGHTS = Names().table()

# Tensors that a checkpoint may hold for nothing: frequencies that follow from the configuration, and the head when it
# is the embedding (an untied model has a parameter made of it, and misses it if it is not there).
IGNORED_TENSORS = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
    r"lm_head\.weight",
)
