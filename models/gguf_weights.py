"""What each parameter of the decoder is made of in a GGUF file. Data.

One table for all architectures: llama.cpp calls what is alike by one name in all of them.
"""

from collections.abc import Mapping

from .weights import Recipe, either, gate_up, paired, plain, qkv

_BLOCK = "blk.{i}."
_NORMS: Mapping[str, tuple[str, ...]] = {
    # Falcon 40B's second name is the norm of attention, and its first one that of the feed-forward.
    "attn_norm": ("attn_norm_2", "attn_norm"),
    "mlp_norm": ("ffn_norm", "post_attention_norm", "attn_norm"),
    "attn_post_norm": ("post_attention_norm",),
    "mlp_post_norm": ("post_ffw_norm",),
    "q_norm": ("attn_q_norm",),
    "k_norm": ("attn_k_norm",),
    "latent.q_norm": ("attn_q_a_norm",),
    "latent.norm": ("attn_kv_a_norm",),
}
"""The first that the file has."""


def _table() -> dict[str, Recipe]:
    found = {
        "layers.{i}.sinks": plain(_BLOCK + "attn_sinks.weight", 2),
        "layers.{i}.latent.up": plain(_BLOCK + "attn_kv_b.weight", 2),
        "layers.{i}.experts.choice_bias": plain(_BLOCK + "exp_probs_b.bias"),
        "layers.{i}.experts.shared_gate.weight": plain(_BLOCK + "ffn_gate_inp_shexp.weight", 2),
    }
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        found[f"embed_norm.{ours}"] = plain(f"token_embd_norm.{theirs}")
        found[f"norm.{ours}"] = plain(f"output_norm.{theirs}")
        for path, names in _NORMS.items():
            # Where heads have scales of their own, these are rows.
            first, *others = (plain(f"{_BLOCK}{name}.{theirs}", 2) for name in reversed(names))
            for one in others:
                first = either(one, first)
            found[f"layers.{{i}}.{path}.{ours}"] = first
    return found | _linear("weight") | _linear("bias")


def _linear(kind: str) -> dict[str, Recipe]:
    def named(*names: str) -> list[str]:
        return [f"{_BLOCK}{name}.{kind}" for name in names]

    def one(name: str, merged: int = 1) -> Recipe:
        return plain(f"{_BLOCK}{name}.{kind}", merged)

    in_layer = {
        "qkv": either(qkv(*named("attn_q", "attn_k", "attn_v")), qkv(*named("attn_qkv"))),
        "out": one("attn_output"),
        "gate_up": either(gate_up(*named("ffn_gate", "ffn_up")), gate_up(*named("ffn_up"))),
        "up": one("ffn_up"),
        "down": one("ffn_down"),
        "latent.q": either(one("attn_q", 2), one("attn_q_b", 2)),
        "latent.q_down": one("attn_q_a"),
        "latent.down": one("attn_kv_a_mqa"),
        "experts.router": one("ffn_gate_inp"),
        # Until April 2024 each of Mixtral's experts had tensors of its own.
        "experts.gate_up": either(
            paired(*named("ffn_gate_exps", "ffn_up_exps")), gate_up(*named("ffn_gate.{e}", "ffn_up.{e}"))
        ),
        "experts.down": either(one("ffn_down_exps"), one("ffn_down.{e}")),
        "experts.shared.gate_up": gate_up(*named("ffn_gate_shexp", "ffn_up_shexp")),
        "experts.shared.down": one("ffn_down_shexp"),
    }
    around = {"embed": "token_embd", "positions": "position_embd", "head": "output"}
    return {f"layers.{{i}}.{path}.{kind}": recipe for path, recipe in in_layer.items()} | {
        f"{path}.{kind}": plain(f"{name}.{kind}") for path, name in around.items()
    }


GGUF_WEIGHTS: Mapping[str, Recipe] = _table()
GGUF_IGNORED = (r"rope_freqs\.weight", r"rope_factors_(long|short)\.weight")
"""Rotary frequencies, which are read with the configuration."""
