"""Checkpoints of transformers as llama.cpp's converter writes them, by the names and the writer of its `gguf` package.

Written from what that converter does, apart from what is under test: the tensors' names are the package's own map.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.support.tiny import hf_tensors

_KEYS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "embedding_length": ("hidden_size", "n_embd", "d_model"),
    "block_count": ("num_hidden_layers", "n_layer", "n_layers"),
    "head_count": ("num_attention_heads", "n_head", "n_heads"),
    "head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "layer_norm_rms_eps": ("rms_norm_eps",),
    "layer_norm_eps": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "rope_freq_base": ("rope_theta",),
    "key_length": ("head_dim",),
    "value_length": ("head_dim",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "attention_scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "clamp_kqv": ("clip_qkv",),
    "rope_freq_base_swa": ("rope_local_base_freq",),
    "parallel_residual": ("use_parallel_residual",),
    "sliding_window": ("sliding_window",),
}
"""The writer's `add_…` by config.json's key."""
_UNSAID = {
    "gptneox": {"rope_freq_base"},
    "granite": {"key_length", "value_length"},
    "falcon": {"rope_freq_base"},
    "phi2": {"rope_freq_base"},
    "phimoe": {"key_length", "value_length"},
    "stablelm": {"rope_freq_base"},
}
"""What the converter leaves out."""
_WINDOWS = ("gemma2", "gemma3", "phi3", "phimoe", "cohere2", "gpt-oss")
"""Those of which it tells the window."""
_PERMUTED = ("llama", "granite", "olmo", "smollm3")
_BY_HEAD = ("bloom", "gptneox", "falcon")


def converted(path: Path, arch: str, to: Path) -> Path:
    """Write a GGUF file of a checkpoint in transformers' layout."""
    said = json.loads((path / "config.json").read_text())
    said |= {key: value for key, value in (said.get("attn_config") or {}).items() if key == "clip_qkv"}
    writer = gguf.GGUFWriter(to, arch)
    keys = {
        key: next((said[name] for name in names if said.get(name) is not None), None)
        for key, names in _KEYS.items()
        if key not in _UNSAID.get(arch, ()) and (key != "sliding_window" or arch in _WINDOWS)
    }
    keys["feed_forward_length"] = keys.get("feed_forward_length") or 4 * keys["embedding_length"]
    keys |= _particular(arch, said, keys)
    for key, value in keys.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    _rope(writer, said)
    ids = json.loads((path / "generation_config.json").read_text()) | said
    for which in ("bos", "eos"):
        if ids.get(f"{which}_token_id") is not None:
            getattr(writer, f"add_{which}_token_id")(ids[f"{which}_token_id"])
    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, keys["block_count"])
    for name, tensor in _tensors(arch, said, keys, hf_tensors(path)):
        there = names.get_name(
            name.removeprefix("transformer.") if arch == "bloom" else name, (".weight", ".bias")
        )
        assert there, f"the package has no name for {name}"
        writer.add_tensor(there, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def _particular(arch: str, said: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    head_dim = keys["embedding_length"] // keys["head_count"]
    match arch:
        case "phi2" | "phi3" | "phimoe" | "stablelm" | "gptneox":
            part = said.get("partial_rotary_factor", said.get("rotary_pct", 1.0))
            return {"rope_dimension_count": int(part * head_dim)}
        case "mpt":
            return {"max_alibi_bias": float(said["attn_config"]["alibi_bias_max"])}
        case "falcon":
            if not said["new_decoder_architecture"]:
                return {"head_count_kv": 1 if said["multi_query"] else keys["head_count"]}
        case "starcoder":
            return {"head_count_kv": 1}
        case "olmo":
            return {"layer_norm_eps": 1e-5}
        case "gpt-oss":
            return {
                "feed_forward_length": said["intermediate_size"],
                "expert_feed_forward_length": said["intermediate_size"],
            }
        case "deepseek2":
            v3 = said["model_type"] == "deepseek_v3"
            return {
                "head_count_kv": 1,
                "key_length": said["kv_lora_rank"] + said["qk_rope_head_dim"],
                "value_length": said["kv_lora_rank"],
                "key_length_mla": said["qk_nope_head_dim"] + said["qk_rope_head_dim"],
                "value_length_mla": said["v_head_dim"],
                "rope_dimension_count": said["qk_rope_head_dim"],
                "expert_weights_norm": True if said["norm_topk_prob"] else None,
                "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID if v3 else None,
            }
        case _:
            pass
    return {}


def _rope(writer: gguf.GGUFWriter, said: dict[str, Any]) -> None:
    rope = said.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(said["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(1.0)
        for which in ("long", "short"):
            factors = np.array(rope[f"{which}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)


def _tensors(
    arch: str, said: dict[str, Any], keys: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """By the names that the package's map knows."""
    heads, kv_heads = keys["head_count"], keys["head_count_kv"] or keys["head_count"]
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: _expert_number(item[0])):
        if said.get("tie_word_embeddings") and name == "lm_head.weight":
            continue
        if arch in _PERMUTED and (found := re.search(r"\.([qk])_proj\.", name)):
            tensor = permuted(tensor, heads if found[1] == "q" else kv_heads)
        elif arch in _BY_HEAD and "query_key_value" in name:
            tensor = _by_part(tensor, heads, kv_heads)
        elif arch == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight", name):
            tensor = tensor.T
        elif arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        elif arch == "gpt-oss" and (split := _gpt_oss(name, tensor)):
            yield from split
            continue
        elif name.endswith("kv_b_proj.weight"):
            both = tensor.reshape(heads, -1, tensor.shape[-1])
            yield name.replace("kv_b_proj", "k_b_proj"), both[:, : said["qk_nope_head_dim"]].swapaxes(1, 2)
            yield name.replace("kv_b_proj", "v_b_proj"), both[:, said["qk_nope_head_dim"] :]
            continue
        elif name.endswith("shared_expert_gate.weight"):
            tensor = tensor[0]
        if re.search(r"experts\.\d+\.", name):
            stacks.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(tensor)
        else:
            yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor
    for name, each in stacks.items():
        merged = re.sub(r"model\.layers\.(\d+)\.block_sparse_moe", r"layers.\1.feed_forward", name)
        yield merged, np.stack(each)


def permuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to a rotary projection."""
    rows = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, rows // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _by_part(tensor: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Queries, then keys, then values, instead of all three by head."""
    group = heads // kv_heads
    by_head = tensor.reshape(kv_heads, group + 2, -1, *tensor.shape[1:])
    parts = (by_head[:, :group], by_head[:, group], by_head[:, group + 1])
    return np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in parts])


def _gpt_oss(name: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]] | None:
    """Gates and what they multiply lie in turns, and matrices inputs first; a sink is no matrix's part."""
    if name.endswith("sinks"):
        return [(name + ".weight", tensor)]
    found = re.fullmatch(r"(.*experts\.)(gate_up|down)_proj(_bias)?", name)
    if found is None:
        return None
    end = "bias" if found[3] else "weight"
    outputs = tensor if found[3] else tensor.swapaxes(1, 2)
    if found[2] == "down":
        return [(f"{found[1]}down_proj.{end}", outputs)]
    return [(f"{found[1]}{part}_proj.{end}", outputs[:, at::2]) for at, part in enumerate(("gate", "up"))]


def _expert_number(name: str) -> int:
    found = re.search(r"experts\.(\d+)\.", name)
    return int(found[1]) if found else -1
