"""A tiny model that nobody trained or built: a configuration on disk, and random weights large enough to matter.

No transformers and no torch, so tests that need no second opinion on the network start at once.
"""

import json
from pathlib import Path

import jax

VOCAB = 19
"""Few enough that the reported alternatives are the whole distribution."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
"""Keys and values, two layers, two heads of 16, float32."""


def untrained_model(path: Path, **changes: object) -> Path:
    """Write the configuration and return where."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


def loud(params: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Dummy weights scaled up until logits differ by more than noise; norm scales stay."""
    return tuple(p * 12 if p.ndim > 1 else p for p in params)
