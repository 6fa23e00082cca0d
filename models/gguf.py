"""The tensors of a GGUF file, dequantised row by row. Knows no parameters and no device.

llama.cpp rotates neighbouring pairs of a head where Hugging Face rotates its two halves, so for architectures of the
llama kind its converter reorders the rows of the query and key projections: [2, pairs] -> [pairs, 2] in each head. Rows
are handed out here in Hugging Face's order again; and scales of norms to which it added 1 without it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from .errors import CheckpointError
from .gguf_config import architecture_of, config_from_gguf, head_counts
from .gguf_file import GgufFile, StoredTensor

__all__ = ["GgufFile", "GgufTensors", "config_from_gguf"]

READABLE = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
"""Storage types that are dequantised here; every other is refused."""
JOINED_VALUES = 8192
"""`dequantize` works on 16 rows at a time: short rows are joined to about this many values, which is up to twice as fast."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    stored: StoredTensor
    kind: GGMLQuantizationType
    data: np.ndarray
    """uint8[rows, bytes a row], mapped; a vector is one row."""
    heads: int
    """Heads whose rows are to be put back in order; 0 for none."""
    added: float
    """What is to be taken off again."""


class GgufTensors:
    """A `TensorSource` over one GGUF file. Everything is float32; reading is thread-safe."""

    def __init__(self, file: GgufFile) -> None:
        """Bound every tensor. Raises CheckpointError for one that is unreadable or cut off."""
        self._file = file
        architecture = architecture_of(file)
        heads = head_counts(file) if architecture.permuted else {}
        self._tensors: dict[str, _Tensor] = {}
        for stored in file.tensors.values():
            reordered = next((heads[part] for part in heads if f".{part}." in stored.name), 0)
            added = 1.0 if architecture.norms_plus_one and stored.name.endswith("norm.weight") else 0.0
            kind, data = self._locate(stored)
            if reordered and stored.shape[0] % (2 * reordered):
                raise file.broken(
                    f"tensor {stored.name}: {stored.shape[0]} rows are not {reordered} heads of pairs"
                )
            self._tensors[stored.name] = _Tensor(stored, kind, data, reordered, added)

    def names(self) -> Iterable[str]:
        """Every tensor, as llama.cpp calls it."""
        return self._tensors.keys()

    def where(self, name: str) -> str:
        """The file."""
        return str(self._file.path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major, outputs first."""
        return self._get(name).stored.shape

    def dtype(self, name: str) -> np.dtype:
        """float32: what every storage type is widened or dequantised to, exactly."""
        self._get(name)
        return np.dtype(np.float32)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32[stop - start, …]; touches only the bytes of those rows."""
        tensor = self._get(name)
        shape = tensor.stored.shape
        if tensor.heads:
            rows = permuted_rows(np.arange(start, stop), shape[0] // tensor.heads)
        else:
            rows = slice(start, stop)
        if len(shape) == 1:
            return _dequantize(tensor.data, tensor.kind).reshape(shape)[rows] - np.float32(tensor.added)
        # A row of the first axis is several stored rows when there are more than two dimensions.
        data = tensor.data.reshape(shape[0], -1)[rows]
        return _dequantize(data, tensor.kind).reshape(len(data), *shape[1:])

    def _get(self, name: str) -> _Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self._file.path}: tensor {name} is missing")
        return tensor

    def _locate(self, stored: StoredTensor) -> tuple[GGMLQuantizationType, np.ndarray]:
        try:
            kind = GGMLQuantizationType(stored.type_id)
        except ValueError:
            raise self._file.broken(
                f"tensor {stored.name} has unknown storage type {stored.type_id}"
            ) from None
        if kind.name not in READABLE:
            readable = ", ".join(READABLE)
            raise self._file.broken(
                f"tensor {stored.name} is stored as {kind.name}, which is not read here; readable: {readable}"
            )
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if stored.shape[-1] % block:
            raise self._file.broken(
                f"tensor {stored.name}: rows of {stored.shape[-1]} are not blocks of {block}"
            )
        return kind, self._file.stored_bytes(stored, stored.shape[-1] // block * block_bytes)


def permuted_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where llama.cpp's converter put these rows of a rotary projection: in each head, [2, pairs] -> [pairs, 2]."""
    head, within = np.divmod(rows, head_dim)
    half, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + pair * 2 + half


def _dequantize(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """uint8[rows, bytes] -> float32 of the same values in the same order; never a view of the file."""
    if kind == GGMLQuantizationType.F32:
        return np.array(data).view("<f4")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, row_bytes = data.shape
    row_values = row_bytes // block_bytes * block
    if not rows:
        return np.empty((0, row_values), np.float32)
    joined = 1
    while rows % (2 * joined) == 0 and joined * row_values < JOINED_VALUES:
        joined *= 2
    return dequantize(np.ascontiguousarray(data).reshape(rows // joined, joined * row_bytes), kind)
