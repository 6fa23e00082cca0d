"""GGUF metadata in the shape of Hugging Face's config.json, so that a family reads both the same way. Knows no weights.

What differs between architectures is in `gguf_architectures.py`; a key that is not understood is refused by name.
"""

import math
from typing import Any

import numpy as np

from .errors import UnsupportedModel
from .gguf_architectures import ARCHITECTURES, Architecture
from .gguf_file import GgufFile
from .gguf_metadata import Metadata
from .gguf_tokenizer import end_ids

ROPE_FREQS = "rope_freqs.weight"
"""The tensor in which llama.cpp keeps Llama 3.1's rescaling of rotary frequencies, worked out."""
ROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
"""Those in which it keeps longrope's divisors."""
_F32 = 0

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every released model with `rope_type: llama3` uses. The file holds only their effect, which is checked."""


def architecture_of(file: GgufFile) -> Architecture:
    """The file's architecture. Raises UnsupportedModel, naming it, if it is not one of ours."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def head_counts(file: GgufFile) -> dict[str, int]:
    """Heads of the two projections that rotate, by their tensors' names."""
    read = _metadata(file)
    heads = read.integer("attention.head_count")
    return {"attn_q": heads, "attn_k": read.integer("attention.head_count_kv", heads)}


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """The file's metadata as a config.json. Raises UnsupportedModel naming the key that is missing or not understood."""
    architecture, read = architecture_of(file), _metadata(file)
    embedding = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [architecture.hf_class],
        "model_type": file.metadata["general.architecture"],
        "hidden_size": read.integer("embedding_length"),
        "intermediate_size": read.integer("feed_forward_length"),
        "num_hidden_layers": read.integer("block_count"),
        "max_position_embeddings": read.integer("context_length"),
        "vocab_size": embedding.shape[0] if embedding else read.integer("vocab_size"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config |= _heads(read, architecture)
    if architecture.norm_eps:
        kind = "_rms" if architecture.norm_eps == "rms_norm_eps" else ""
        config[architecture.norm_eps] = read.number(f"attention.layer_norm{kind}_epsilon")
    config |= architecture.particulars(read)
    read.finish()
    return config | _special_ids(file)


def _metadata(file: GgufFile) -> Metadata:
    return Metadata(file, str(file.metadata.get("general.architecture")))


def _heads(read: Metadata, architecture: Architecture) -> dict[str, Any]:
    """Their number, size and rotation."""
    heads = read.integer("attention.head_count")
    counts: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": read.integer("attention.head_count_kv", heads),
    }
    if architecture.latent:
        return counts | _rope(read, architecture, read.integer("rope.dimension_count"))
    head_dim = read.integer("attention.key_length", read.integer("embedding_length") // heads)
    counts["head_dim"] = head_dim
    if (value := read.integer("attention.value_length", head_dim)) != head_dim:
        raise read.refused(
            "attention.value_length", value, f"only heads of one width are supported, here {head_dim}"
        )
    if not architecture.rotates:
        return counts
    rotary = read.integer("rope.dimension_count", head_dim)
    if architecture.partial_rotary:
        # Who reads this rounds down: halfway to the next, so that it comes out as it is.
        counts["partial_rotary_factor"] = (rotary + 0.5) / head_dim
    elif rotary != head_dim:
        raise read.refused("rope.dimension_count", rotary, f"heads are expected to rotate whole, {head_dim}")
    return counts | _rope(read, architecture, rotary)


def _rope(read: Metadata, architecture: Architecture, width: int) -> dict[str, Any]:
    """Base and rescaling of the frequencies."""
    theta = read.number("rope.freq_base", 10000.0)
    scaling = _rope_scaling(read, architecture, theta, width)
    return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(
    read: Metadata, architecture: Architecture, theta: float, width: int
) -> dict[str, Any] | None:
    kind, factor = read.text("rope.scaling.type", "none"), read.number("rope.scaling.factor", 1.0)
    original = read.integer("rope.scaling.original_context_length", 0) or None
    if (linear := read.number("rope.scale_linear", 1.0)) != 1.0:
        kind, factor = "linear", linear
    if read.holds(ROPE_FREQS):
        if kind not in ("none", "llama3"):
            raise read.refused("rope.scaling.type", kind, f"not together with {ROPE_FREQS}")
        return _llama3_scaling(read.file, theta, width)
    if read.holds(ROPE_FACTORS[0]):
        return _longrope(read, architecture, width, original)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        # Absent, or 0 in old files: the context that the file names.
        scaling |= {"original_max_position_embeddings": original} | _yarn(read, architecture)
    # Whatever else it is, the family is asked and refuses what it lacks by its name.
    return scaling


def _yarn(read: Metadata, architecture: Architecture) -> dict[str, Any]:
    if (extrapolation := read.number("rope.scaling.yarn_ext_factor", 1.0)) != 1.0:
        raise read.refused("rope.scaling.yarn_ext_factor", extrapolation, "1.0 is expected")
    given = read.given(
        {
            "rope.scaling.yarn_beta_fast": "beta_fast",
            "rope.scaling.yarn_beta_slow": "beta_slow",
            "rope.scaling.yarn_attn_factor": "attention_factor",
        }
    )
    if given.get("attention_factor", 1.0) < 1.0:
        # Two things are written there. No factor of yarn's is less than 1, but what takes some of it back is.
        given["attn_factor"] = given.pop("attention_factor")
    if not architecture.yarn_truncates:
        given["truncate"] = False
    if architecture.latent:
        # A tenth of `mscale_all_dim`, which is also `mscale` in all that were released.
        weight = 10 * read.number("rope.scaling.yarn_log_multiplier", 0.0)
        given |= {"mscale": weight, "mscale_all_dim": weight} if weight else {}
    return given


def _longrope(read: Metadata, architecture: Architecture, width: int, original: int | None) -> dict[str, Any]:
    short, long = (_float32(read.file, name, width // 2) for name in ROPE_FACTORS)
    given = read.given({"rope.scaling.attn_factor": "attention_factor"})
    if (mscale := architecture.longrope_mscale) is not None:
        given |= {"short_mscale": mscale, "long_mscale": mscale}
    return given | {
        "rope_type": "longrope",
        "short_factor": short.astype(float).tolist(),
        "long_factor": long.astype(float).tolist(),
        "original_max_position_embeddings": original,
    }


def _float32(file: GgufFile, name: str, size: int) -> np.ndarray:
    stored = file.tensors.get(name)
    if stored is None or stored.type_id != _F32 or stored.shape != (size,):
        raise file.broken(f"{name} should be {size} float32, not {stored and stored.shape}")
    return file.stored_bytes(stored, size * 4).view("<f4")[0]


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the parameters whose effect the tensor holds; refuse a tensor they do not explain."""
    factors = _float32(file, ROPE_FREQS, head_dim // 2)
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
    return {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [*end_ids(file.metadata)],
    }
