"""Tiny GGUF files of every kind, written with the gguf package's own writer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

D, HEADS, KV_HEADS, HEAD_DIM, F, V, LAYERS = 256, 4, 2, 64, 512, 48, 2
"""As the room's letters; 256 is the width of a block of the K types."""


def metadata(arch: str = "llama") -> dict[str, Any]:
    """What a converter writes for a model of these sizes."""
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": D,
        f"{arch}.feed_forward_length": F,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """GGUF names and row-major shapes of all tensors but a separate head."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    for i in range(LAYERS):
        found |= {
            f"blk.{i}.attn_norm.weight": (D,),
            f"blk.{i}.attn_q.weight": (HEADS * HEAD_DIM, D),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD_DIM, D),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD_DIM, D),
            f"blk.{i}.attn_output.weight": (D, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm.weight": (D,),
            f"blk.{i}.ffn_gate.weight": (F, D),
            f"blk.{i}.ffn_up.weight": (F, D),
            f"blk.{i}.ffn_down.weight": (D, F),
        }
    return found


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 for every tensor."""
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes().items()}


def stored(values: np.ndarray, kind: Type) -> np.ndarray:
    """The bytes of a tensor in a storage type; for types the package cannot write, arbitrary finite blocks."""
    if kind in (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1):
        return gguf.quants.quantize(values, kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(1)
    # Bytes below 60 keep the scales, float16, small.
    return random.integers(
        0, 60, (*values.shape[:-1], values.shape[-1] // block * block_bytes), dtype=np.uint8
    )


def write(
    path: Path,
    arch: str = "llama",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    kind: Type = Type.F32,
) -> Path:
    """Write a file: metadata (None removes a key), tensors given or random, matrices in `kind`."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in ({**metadata(arch), **(keys or {})}).items():
        if value is not None:
            add(writer, key, value)
    for name, values in (weights() if tensors is None else tensors).items():
        how = kind if values.ndim > 1 else Type.F32
        writer.add_tensor(name, stored(values, how), raw_dtype=None if how == Type.F32 else how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
