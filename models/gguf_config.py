"""GGUF metadata in the shape of Hugging Face's config.json, so that a family reads both the same way. Knows no weights.

What a converter drops because llama.cpp hard-codes it (SmolLM3's layers without positions) is put back here; a key of
the architecture that is not understood is refused by name.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UnsupportedModel
from .gguf_file import GgufFile

ROPE_FREQS = "rope_freqs.weight"
"""The tensor in which llama.cpp keeps Llama 3.1's rescaling of rotary frequencies, worked out."""
_F32 = 0

SMOLLM3_ROPE_STEP = 4
"""Every fourth layer of SmolLM3 has no positions; llama.cpp hard-codes it."""
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every released model with `rope_type: llama3` uses. The file holds only their effect, which is checked."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between llama.cpp's architectures."""

    name: str
    hf_class: str
    permuted: bool
    """Its converter reorders the rows of q and k (see gguf.py)."""


ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("llama", "LlamaForCausalLM", permuted=True),
        Architecture("smollm3", "SmolLM3ForCausalLM", permuted=True),
        Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
        Architecture("qwen3", "Qwen3ForCausalLM", permuted=False),
    )
}

_KNOWN = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scale_linear", "expert_count", "expert_used_count",
}  # fmt: skip
"""Keys under the architecture's name that are read below, or refused there by value."""


def architecture_of(file: GgufFile) -> Architecture:
    """The file's architecture. Raises UnsupportedModel, naming it, if it is not one of ours."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def head_counts(file: GgufFile) -> dict[str, int]:
    """Heads of the two projections that rotate, by the middle of their tensors' names at Hugging Face."""
    read = _Reader(file)
    heads = read.integer("attention.head_count")
    return {"q_proj": heads, "k_proj": read.integer("attention.head_count_kv", heads)}


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """The file's metadata as a config.json. Raises UnsupportedModel naming the key that is missing or not understood."""
    read = _Reader(file)
    heads, hidden = read.integer("attention.head_count"), read.integer("embedding_length")
    head_dim = read.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := read.integer(key, head_dim)) != head_dim:
            raise read.refused(key, value, f"only heads of one width are supported, here {head_dim}")
    if experts := read.integer("expert_count", 0):
        raise read.refused("expert_count", experts, "mixtures of experts are not supported")
    embedding = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [read.architecture.hf_class],
        "model_type": read.architecture.name,
        "hidden_size": hidden,
        "intermediate_size": read.integer("feed_forward_length"),
        "num_hidden_layers": read.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": read.integer("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, read, head_dim),
        "vocab_size": embedding.shape[0] if embedding else read.integer("vocab_size"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config |= _particulars(file, read)
    return config | _special_ids(file)


class _Reader:
    """Metadata under the architecture's name; refuses keys it does not know when made."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = architecture_of(file)
        self.prefix = self.architecture.name + "."
        for key, value in file.metadata.items():
            if key.startswith(self.prefix) and key.removeprefix(self.prefix) not in _KNOWN:
                raise self.refused(key.removeprefix(self.prefix), value, "this option is not understood")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number, not 0 unless there is a default; one for all layers where the file has one for each."""
        value = self._get(key, default)
        if type(value) is not int or value < (default is None):
            raise self.refused(key, value, "a whole number is expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, as the person wrote it who chose it: before it was rounded to float32."""
        value = self._get(key, default)
        if not isinstance(value, int | float):
            raise self.refused(key, value, "a number is expected")
        return float(f"{value:.6g}")  # 9.99999974e-06 -> 1e-05

    def text(self, key: str, default: str) -> str:
        """A name."""
        return str(self._get(key, default))

    def _get(self, key: str, default: object) -> object:
        value = self.file.metadata.get(self.prefix + key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.refused(key, value, "layers must be alike")
            value = value[0]
        if value is None:
            raise UnsupportedModel(f"{self.file.path}: {self.prefix}{key} is missing")
        return value

    def refused(self, key: str, value: object, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.file.path}: {self.prefix}{key} = {value!r}: {why}")


def _particulars(file: GgufFile, read: _Reader) -> dict[str, Any]:
    """Keys that only some model types have."""
    kind, window = read.architecture.name, read.integer("attention.sliding_window", 0)
    biases = {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    if window:
        # llama.cpp files Mistral under `llama`; of that kind only Mistral has a window.
        if kind != "llama" or any(biases.values()):
            raise read.refused("attention.sliding_window", window, "only Mistral's window is understood")
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        return mistral | {"sliding_window": window}
    if kind == "smollm3":
        layers = range(1, read.integer("block_count") + 1)
        return biases | {"no_rope_layers": [int(layer % SMOLLM3_ROPE_STEP != 0) for layer in layers]}
    # Qwen's biases go without saying; a tensor that is not expected is found by the loader.
    return biases if kind == "llama" else {}


def _rope_scaling(file: GgufFile, read: _Reader, head_dim: int) -> dict[str, Any] | None:
    kind, factor = read.text("rope.scaling.type", "none"), read.number("rope.scaling.factor", 1.0)
    if (linear := read.number("rope.scale_linear", 1.0)) != 1.0:
        kind, factor = "linear", linear
    if ROPE_FREQS in file.tensors:
        if kind not in ("none", "llama3"):
            raise read.refused("rope.scaling.type", kind, f"not together with {ROPE_FREQS}")
        return _llama3_scaling(file, read.number("rope.freq_base", 10000.0), head_dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        # Absent, or 0 in old files: the context that the file names.
        scaling["original_max_position_embeddings"] = (
            read.integer("rope.scaling.original_context_length", 0) or None
        )
    # Whatever else it is, the family is asked and refuses what it lacks by its name.
    return scaling


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the parameters whose effect the tensor holds; refuse a tensor they do not explain."""
    stored = file.tensors[ROPE_FREQS]
    if stored.type_id != _F32 or stored.shape != (head_dim // 2,):
        raise file.broken(f"{ROPE_FREQS} should be {head_dim // 2} float32, not {stored.shape}")
    factors = file.stored_bytes(stored, stored.shape[0] * 4).view("<f4")[0]
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3_SCALING}
    if not np.allclose(factors, _llama3_factors(scaling, theta, head_dim), rtol=1e-3):
        raise UnsupportedModel(
            f"{file.path}: {ROPE_FREQS} is not Llama 3's rescaling of rotary frequencies, the only one understood"
        )
    return scaling


def _llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What each frequency is divided by (Llama 3.1's rule)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _special_ids(file: GgufFile) -> dict[str, Any]:
    """bos_token_id, and eos_token_id as the list of all ids that end a text: of a text, a turn and a message."""
    ids = (file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(i for i in ids if i is not None)),
    }
