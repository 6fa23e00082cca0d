"""llama.cpp's architectures: which of ours each is, and what its converter changed or left out. A table.

What llama.cpp hard-codes, and so drops from its files, is put back here. Knows keys and tensors' names, not their layout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .gguf_metadata import Metadata

Particulars = Callable[[Metadata], dict[str, Any]]
"""The part of config.json that only this architecture has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What differs between them."""

    hf_class: str
    norm_eps: str | None = "rms_norm_eps"
    """config.json's key; None where no key says it."""
    rotates: bool = True
    partial_rotary: bool = False
    """Not all dimensions of a head need rotate."""
    permuted: bool = False
    """Its converter reorders the rows of q and k (see gguf.py)."""
    norms_plus_one: bool = False
    """Its converter adds 1 to the scales of norms."""
    yarn_truncates: bool = True
    """See `config.YarnRope`."""
    latent: bool = False
    """Keys and values are in latent form."""
    longrope_mscale: float | None = None
    """What longrope multiplies by, where that is not computed but chosen; converters drop it."""
    particulars: Particulars = lambda read: {}


def _llama(read: Metadata) -> dict[str, Any]:
    window = read.integer("attention.sliding_window", 0)
    biases = _biases(read)
    experts = read.integer("expert_count", 0)
    chosen = read.integer("expert_used_count", None if experts else 0)
    if experts:
        return _class("Mixtral") | {
            "num_local_experts": experts,
            "num_experts_per_tok": chosen,
            "sliding_window": window or None,
        }
    if not window:
        return biases
    # llama.cpp files Mistral under `llama`; of that kind only Mistral has a window.
    if any(biases.values()):
        raise read.refused("attention.sliding_window", window, "only Mistral's window is understood")
    return _class("Mistral") | {"sliding_window": window}


def _biases(read: Metadata) -> dict[str, Any]:
    return {
        "attention_bias": read.holds("blk.0.attn_q.bias"),
        "mlp_bias": read.holds("blk.0.ffn_up.bias"),
    }


def _class(name: str) -> dict[str, Any]:
    return {"architectures": [name + "ForCausalLM"]}


SMOLLM3_ROPE_STEP = 4
"""Every fourth layer of SmolLM3 has no positions."""


def _smollm3(read: Metadata) -> dict[str, Any]:
    layers = range(1, read.integer("block_count") + 1)
    return _biases(read) | {"no_rope_layers": [int(layer % SMOLLM3_ROPE_STEP != 0) for layer in layers]}


def _qwen_moe(read: Metadata) -> dict[str, Any]:
    return read.given(
        {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        }
    )


def _qwen3_moe(read: Metadata) -> dict[str, Any]:
    return _qwen_moe(read) | {"norm_topk_prob": True}


GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Scores of the largest are divided by the root of hidden_size / heads, of the others by that of the head's size."""


def _gemma2(read: Metadata) -> dict[str, Any]:
    return _gemma_scale(read, "gemma2") | read.given(
        {
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        }
    )


def _gemma3(read: Metadata) -> dict[str, Any]:
    return _gemma_scale(read, "gemma3") | read.given(
        {
            "attention.sliding_window": "sliding_window",
            "attention.sliding_window_pattern": "sliding_window_pattern",
            "rope.freq_base_swa": "rope_local_base_freq",
            "final_logit_softcapping": "final_logit_softcapping",
        }
    )


def _gemma_scale(read: Metadata, name: str) -> dict[str, Any]:
    heads, hidden = read.integer("attention.head_count"), read.integer("embedding_length")
    head_dim = read.integer("attention.key_length", hidden // heads)
    largest = read.integer("block_count") == GEMMA_27B_LAYERS[name]
    return {"query_pre_attn_scalar": hidden // heads if largest else head_dim}


def _phi3(read: Metadata) -> dict[str, Any]:
    # 0 stands for none (Phi-4).
    return {"sliding_window": read.integer("attention.sliding_window", 0) or None}


PHIMOE_MSCALE = 1.243163121016122
"""Of the one that was released: its converter writes what others compute instead."""


def _phimoe(read: Metadata) -> dict[str, Any]:
    experts = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
    biases = {"attention_bias": "blk.0.attn_q.bias", "lm_head_bias": "output.bias"}
    return _phi3(read) | read.given(experts) | {key: read.holds(name) for key, name in biases.items()}


def _stablelm(read: Metadata) -> dict[str, Any]:
    # Its converter says this where config.json does not, wrongly: the norm between the two says it.
    read.flag("use_parallel_residual", True)
    return {
        "use_parallel_residual": not read.holds("blk.0.ffn_norm.weight"),
        "use_qkv_bias": read.holds("blk.0.attn_q.bias"),
        "qk_layernorm": read.holds("blk.0.attn_q_norm.weight"),
    }


def _falcon(read: Metadata) -> dict[str, Any]:
    heads = read.integer("attention.head_count")
    kv_heads = read.integer("attention.head_count_kv", heads)
    return {
        "new_decoder_architecture": kv_heads not in (1, heads),
        "multi_query": kv_heads == 1,
        "num_ln_in_parallel_attn": 2 if read.holds("blk.0.attn_norm_2.weight") else 1,
        "bias": read.holds("blk.0.attn_qkv.bias"),
    }


def _gpt_neox(read: Metadata) -> dict[str, Any]:
    return {
        "use_parallel_residual": read.flag("use_parallel_residual", True),
        "attention_bias": read.holds("blk.0.attn_qkv.bias"),
    }


def _mpt(read: Metadata) -> dict[str, Any]:
    most = read.number("attention.max_alibi_bias", 0.0)
    clip = read.given({"attention.clamp_kqv": "clip_qkv"})
    return {"attn_config": {"alibi": most > 0, **({"alibi_bias_max": most} if most else {}), **clip}}


STARCODER2_WINDOW = 4096
"""Of all that were released; llama.cpp knows none."""


def _starcoder2(read: Metadata) -> dict[str, Any]:
    return {"use_bias": read.holds("blk.0.attn_q.bias"), "sliding_window": STARCODER2_WINDOW}


def _olmo(read: Metadata) -> dict[str, Any]:
    if (epsilon := read.number("attention.layer_norm_epsilon", 1e-5)) != 1e-5:
        raise read.refused("attention.layer_norm_epsilon", epsilon, "1e-05 is expected")
    return read.given({"attention.clamp_kqv": "clip_qkv"})


def _command_r(read: Metadata) -> dict[str, Any]:
    return {"use_qk_norm": read.holds("blk.0.attn_q_norm.weight")} | read.given(
        {"logit_scale": "logit_scale"}
    )


def _cohere2(read: Metadata) -> dict[str, Any]:
    return read.given({"logit_scale": "logit_scale", "attention.sliding_window": "sliding_window"})


def _granite(read: Metadata) -> dict[str, Any]:
    return _biases(read) | read.given(
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        }
    )


def _gpt_oss(read: Metadata) -> dict[str, Any]:
    return read.given(
        {
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": "sliding_window",
        }
    )


SIGMOID = 2
"""llama.cpp's number of the way to choose experts."""


UNNAMED_GROUPS = {(True, 256): (8, 4), (False, 160): (8, 3)}
"""Groups of experts, and those chosen, of V3 and R1, and of V2 and Coder-V2, by their number: files of before 2025 do not say."""


def _deepseek2(read: Metadata) -> dict[str, Any]:
    gating = read.integer("expert_gating_func", 1)
    v3 = gating == SIGMOID or read.holds(f"blk.{read.integer('block_count') - 1}.exp_probs_b.bias")
    normalized = read.flag("expert_weights_norm", False)
    usual = UNNAMED_GROUPS.get((v3, read.integer("expert_count", 0)), (1, 1))
    groups, chosen_groups = (
        read.integer(f"expert_group_{key}count", default)
        for key, default in zip(("", "used_"), usual, strict=True)
    )
    found = read.given(
        {
            "attention.q_lora_rank": "q_lora_rank",
            "attention.kv_lora_rank": "kv_lora_rank",
            "rope.dimension_count": "qk_rope_head_dim",
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_count": "n_routed_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_shared_count": "n_shared_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_weights_scale": "routed_scaling_factor",
        }
    )
    # Older files have the sizes of heads where newer ones have those of what is kept of a token.
    key, value = (
        read.integer(f"attention.{name}_length_mla", read.integer(f"attention.{name}_length"))
        for name in ("key", "value")
    )
    method = "noaux_tc" if v3 else "group_limited_greedy" if groups > 1 else "greedy"
    return (_class("DeepseekV3") if v3 else _class("DeepseekV2")) | found | {
        "qk_nope_head_dim": key - found.get("qk_rope_head_dim", 0),
        "v_head_dim": value,
        "n_group": groups,
        "topk_group": chosen_groups,
        "topk_method": method,
        "scoring_func": "sigmoid" if v3 else "softmax",
        "norm_topk_prob": normalized,
    }  # fmt: skip


def _architecture(name: str, **how: Any) -> Architecture:
    return Architecture(hf_class=name + "ForCausalLM", **how)


_GPT: dict[str, Any] = {"norm_eps": "layer_norm_epsilon", "rotates": False}

ARCHITECTURES: Mapping[str, Architecture] = {
    "bloom": _architecture("Bloom", **_GPT),
    "cohere2": _architecture("Cohere2", norm_eps="layer_norm_eps", particulars=_cohere2),
    "command-r": _architecture("Cohere", norm_eps="layer_norm_eps", particulars=_command_r),
    "deepseek2": _architecture("DeepseekV2", latent=True, particulars=_deepseek2),
    "falcon": _architecture("Falcon", norm_eps="layer_norm_epsilon", particulars=_falcon),
    "gemma": _architecture("Gemma", norms_plus_one=True),
    "gemma2": _architecture("Gemma2", norms_plus_one=True, particulars=_gemma2),
    "gemma3": _architecture("Gemma3", norms_plus_one=True, particulars=_gemma3),
    "gpt-oss": _architecture("GptOss", yarn_truncates=False, particulars=_gpt_oss),
    "gpt2": Architecture(hf_class="GPT2LMHeadModel", **_GPT),
    "gptneox": _architecture(
        "GPTNeoX", norm_eps="layer_norm_eps", partial_rotary=True, particulars=_gpt_neox
    ),
    "granite": _architecture("Granite", permuted=True, particulars=_granite),
    "llama": _architecture("Llama", permuted=True, particulars=_llama),
    "mpt": _architecture("MPT", **_GPT, particulars=_mpt),
    "olmo": _architecture("Olmo", norm_eps=None, permuted=True, particulars=_olmo),
    "olmo2": _architecture("Olmo2"),
    "phi2": _architecture("Phi", norm_eps="layer_norm_eps", partial_rotary=True),
    "phi3": _architecture("Phi3", partial_rotary=True, particulars=_phi3),
    "phimoe": _architecture("PhiMoE", longrope_mscale=PHIMOE_MSCALE, particulars=_phimoe),
    "qwen2": _architecture("Qwen2"),
    "qwen2moe": _architecture("Qwen2Moe", particulars=_qwen_moe),
    "qwen3": _architecture("Qwen3"),
    "qwen3moe": _architecture("Qwen3Moe", particulars=_qwen3_moe),
    "smollm3": _architecture("SmolLM3", permuted=True, particulars=_smollm3),
    "stablelm": _architecture(
        "StableLm", norm_eps="layer_norm_eps", partial_rotary=True, particulars=_stablelm
    ),
    "starcoder": _architecture("GPTBigCode", **_GPT),
    "starcoder2": _architecture("Starcoder2", norm_eps="norm_epsilon", particulars=_starcoder2),
}
