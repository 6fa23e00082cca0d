"""Tiny random models of every family, built by transformers on the spot, and what transformers itself answers with them.

The independent witness of decoder and loader. Seeded, float32; every weight is large enough to matter, biases and norm
scales included (transformers would leave those at 0 and 1, where a mistake does not show).
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_BASE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}

_KINDS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mha-even-vocab": ("Llama", {"num_key_value_heads": 4, "vocab_size": 132}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("Llama", {"rope_scaling": _LLAMA3, "rope_theta": 500000.0}),
    "llama-linear-rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-head-dim": ("Llama", {"head_dim": 24}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "mistral-full-mqa": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window-tied": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-biases-tied": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window-mha": (
        "Qwen3",
        {"head_dim": 16, "num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "smollm3-tied": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3-window": (
        "SmolLM3",
        {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 5, "attention_bias": True},
    ),
    "gemma": ("Gemma", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 20,
         "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 5, "sliding_window_pattern": 2,
         "query_pre_attn_scalar": 20, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3": ("Phi3", {"sliding_window": 5, "partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "Phi3",
        {"original_max_position_embeddings": 256, "max_position_embeddings": 256,
         "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 7 + [2.0], "long_factor": [4.0] * 8}},
    ),
    "phi": ("Phi", {}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "olmo": ("Olmo", {"clip_qkv": 0.7}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {"use_qk_norm": True, "tie_word_embeddings": True, "logit_scale": 0.3}),
    "cohere2": ("Cohere2", {"tie_word_embeddings": True, "sliding_window": 5, "sliding_window_pattern": 2}),
    "starcoder2": ("Starcoder2", {"sliding_window": 5}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox-serial": ("GPTNeoX", {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0}),
    "gptj": ("GPTJ", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "falcon-7b": ("Falcon", {"tie_word_embeddings": True}),
    "falcon-40b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (
        "Falcon", {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True, "num_attention_heads": 4},
    ),
    "gpt2": (
        "GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True}),
    "gpt_bigcode": (
        "GPTBigCode", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True},
    ),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4, "seq_length": 256, "tie_word_embeddings": True}),
    "bloom-odd-heads": (
        "Bloom", {"n_layer": 2, "n_head": 6, "hidden_size": 48, "seq_length": 256, "tie_word_embeddings": True},
    ),
    "mpt": (
        "Mpt",
        {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "tie_word_embeddings": True,
         "attn_config": {"clip_qkv": 0.7, "attn_type": "multihead_attention"}},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48,
         "mlp_only_layers": [0]},
    ),
    "qwen3_moe": (
        "Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    ),
    "phimoe": ("Phimoe", {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "head_dim": 16, "sliding_window": 5,
         "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT, "q_lora_rank": None, "num_experts_per_tok": 3, "topk_method": "group_limited_greedy",
         "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**_LATENT, "q_lora_rank": 32, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "attention_bias": True,
         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0,
                          "mscale": 1.0, "mscale_all_dim": 0.8}},
    ),
    "deepseek_v3-moonlight": (
        "DeepseekV3",
        {**_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False},
    ),
    "llama-yarn": (
        "Llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}},
    ),
}  # fmt: skip

TINY_KINDS = tuple(_KINDS)

_OF_GGUF: Mapping[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe-gguf": (
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48},
    ),
    "phimoe-gguf": ("Phimoe", {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}),
    "smollm3-gguf": ("SmolLM3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "gemma2-gguf": (
        "Gemma2", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    ),
    "gemma3-gguf": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16, "num_hidden_layers": 6,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "cohere2-gguf": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 5, "tie_word_embeddings": True}),
    "starcoder2-gguf": ("Starcoder2", {"sliding_window": 4096}),
    "deepseek_v3-gguf": (
        "DeepseekV3",
        {**_LATENT, "q_lora_rank": 32, "n_group": 4, "topk_group": 2,
         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.8,
                          "mscale_all_dim": 0.8}},
    ),
}  # fmt: skip
"""Of forms that GGUF can say, where those above are of others."""

_OF_BLOCKS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "qwen3-blocks": ("Qwen3", {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}),
    "deepseek_v3-blocks": (
        "DeepseekV3",
        {**_LATENT, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128,
         "kv_lora_rank": 128, "v_head_dim": 32, "n_group": 4, "topk_group": 2},
    ),
}  # fmt: skip
"""Whose inputs divide into blocks of 128."""


def one_of_each(kinds: Sequence[str]) -> list[str]:
    """The first kind of each family that two devices can share."""
    first: dict[str, str] = {}
    for kind in kinds:
        first.setdefault(kind.split("-")[0], kind)
    return list((first | {"falcon": "falcon-40b"}).values())


def tiny_model(kind: str, directory: Path, *, sharded: bool = False, dtype: str = "float32") -> Path:
    """Build one of TINY_KINDS, _OF_GGUF or _OF_BLOCKS under `directory` and return where. Built once per directory, kind and form."""
    path = directory / f"{kind}-{dtype}{'-sharded' if sharded else ''}"
    if path.exists():
        return path
    import torch
    import transformers

    name, options = {**_KINDS, **_OF_GGUF, **_OF_BLOCKS}[kind]
    model_class = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    known = {
        *inspect.signature(model_class.config_class.__init__).parameters,
        "tie_word_embeddings",
        "pad_token_id",
    }
    base = {key: value for key, value in _BASE.items() if key in known}
    config = model_class.config_class(**{**base, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        _randomise(model)
    model = model.to(getattr(torch, dtype))
    # About six files, so that layers and even one layer's tensors are spread over several.
    model.save_pretrained(path, max_shard_size="100KB" if sharded else "5GB")
    return path


def _randomise(model: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if "norm" in name or "ln_" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand(buffer.shape))


@lru_cache(maxsize=4)
def hf_model(path: Path) -> Any:
    """The model as transformers loads it, with its plainest attention, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    # transformers 4.57's plain attention adds Falcon's ALiBi twice, to the scores and again with the mask.
    how = "sdpa" if path.name.startswith("falcon") else "eager"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=how)
    return model.eval()


def hf_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """float32[T, V]: transformers' logits at every position of one sequence."""
    import torch

    with torch.no_grad():
        return hf_model(path)(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def hf_greedy(path: Path, ids: Sequence[int], n: int) -> list[int]:
    """The n likeliest next tokens, one after another, computed without a cache; end of text does not stop it."""
    text = list(ids)
    for _ in range(n):
        text.append(int(hf_logits(path, text)[-1].argmax()))
    return text[len(ids) :]


def hf_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint as the safetensors library reads it."""
    import ml_dtypes  # noqa: F401 (bfloat16 for numpy)
    from safetensors import safe_open

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    return tensors
