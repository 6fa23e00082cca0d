"""What few bits make of weights, written as naively as the definitions read, and checkpoints with such weights.

transformers, given the rounded weights in float32, is the witness of everything between file and logits.
"""

import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.support.tiny import hf_tensors

GROUP = 32
TABLES = re.compile(r"embed_tokens|word_embeddings|wte|embed_in|embed_out|lm_head")
"""Of vectors: 8 bits at least."""
WHOLE = re.compile(r"norm|wpe|embed_positions|[._]gate\.weight|router|bias|kv_b_proj")
"""Not rounded: norms, positions, biases, what chooses among experts, and what makes heads of a latent vector."""
INPUTS_FIRST = re.compile(r"^gpt2.*(c_attn|c_proj|c_fc)|^gpt_oss.*experts")
"""Stored [inputs, outputs]: model and tensor."""


def rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """float32[N, D] -> what is left of it in `int8` or `int4`."""
    out = np.empty_like(weight, np.float32)
    for row, values in enumerate(weight.astype(np.float32)):
        if kind == "int4" and len(values) % GROUP == 0:
            out[row] = np.concatenate([_int4(group) for group in np.split(values, len(values) // GROUP)])
        else:
            scale = np.float32(np.abs(values).max() / 127)
            out[row] = np.round(values / scale) * scale if scale else 0
    return out


def _int4(group: np.ndarray) -> np.ndarray:
    """Sixteen levels from the smallest to the largest."""
    floor = np.float32(ml_dtypes.bfloat16(group.min()))
    scale = np.float32(ml_dtypes.bfloat16((group.max() - group.min()) / np.float32(15)))
    return (
        np.clip(np.round((group - floor) / scale), 0, 15) * scale + floor
        if scale
        else np.full_like(group, floor)
    )


FINITE = np.array([bits for bits in range(256) if bits & 127 != 127], np.uint8).view(ml_dtypes.float8_e4m3fn)
"""Every number of FP8."""


def in_bytes(
    rng: np.random.Generator, kind: str, group: int, *shape: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random weight [..., D] of `int8` or `fp8` as checkpoints have it, with a scale for so many inputs (0: for all) -> its
    values, its scales, and what it stands for, in float64."""
    values = rng.choice(FINITE, shape) if kind == "fp8" else rng.integers(-127, 128, shape).astype(np.int8)
    scales = rng.uniform(0.001, 0.002, (*shape[:-1], shape[-1] // group if group else 1)).astype(np.float32)
    spread = scales.astype(np.float64).repeat(shape[-1] // scales.shape[-1], axis=-1)
    return values, scales, values.astype(np.float64) * spread


def rounded_model(path: Path, kind: str) -> Path:
    """A copy of a checkpoint whose weights are rounded. Made once."""
    copy = path.with_name(f"{path.name}-{kind}")
    if copy.exists():
        return copy
    tensors = hf_tensors(path)
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or WHOLE.search(name):
            continue
        bits = "int8" if TABLES.search(name) else kind
        inputs_last = tensor.swapaxes(-1, -2) if INPUTS_FIRST.search(f"{path.name} {name}") else tensor
        flat = rounded(inputs_last.reshape(-1, inputs_last.shape[-1]), bits).reshape(inputs_last.shape)
        tensors[name] = flat.swapaxes(-1, -2).copy() if inputs_last is not tensor else flat
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
