"""MXFP4 tensors (gpt-oss) as if they were stored in bfloat16. Knows the format, and neither files nor parameters.

Of the OCP Microscaling formats, v1.0: 32 values of 4 bits (E2M1) share an exponent of 8 bits. A tensor `name` is stored as
`name_blocks` uint8[…, rows, blocks, 16], two values a byte, the lower four bits first, and `name_scales` uint8[…, rows,
blocks]. It is shown as transformers shows it, inputs first: bfloat16[…, 32 blocks, rows], which holds every such value
exactly.
"""

from collections.abc import Iterable
from typing import Protocol

import ml_dtypes
import numpy as np

from .errors import CheckpointError
from .weights import TensorSource

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BIAS = 127
"""Of the shared exponent."""


class ByteSource(TensorSource, Protocol):
    """A `TensorSource` that also hands out tensors of bytes."""

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the first axis of a tensor of one byte a value, as uint8."""
        ...


class Mxfp4Tensors:
    """A `TensorSource` that passes on what is not in this format."""

    def __init__(self, tensors: ByteSource) -> None:
        self._tensors = tensors
        names = frozenset(tensors.names())
        stems = (name.removesuffix(BLOCKS) for name in names if name.endswith(BLOCKS))
        self._packed = frozenset(stem for stem in stems if stem + SCALES in names)

    def names(self) -> Iterable[str]:
        """Every tensor, those in this format under one name each."""
        halves = {stem + end for stem in self._packed for end in (BLOCKS, SCALES)}
        return [*self._packed, *(name for name in self._tensors.names() if name not in halves)]

    def where(self, name: str) -> str:
        """The file a tensor lies in."""
        return self._tensors.where(name + BLOCKS if name in self._packed else name)

    def shape(self, name: str) -> tuple[int, ...]:
        """What `read_rows` returns of all rows."""
        if name not in self._packed:
            return self._tensors.shape(name)
        stored = self._tensors.shape(name + BLOCKS)
        if len(stored) < 4 or stored[-1] != 16 or self._tensors.shape(name + SCALES) != stored[:-1]:
            raise CheckpointError(
                f"{self.where(name)}: tensor {name} is no MXFP4: blocks {stored}, scales "
                f"{self._tensors.shape(name + SCALES)}"
            )
        *before, rows, blocks, _ = stored
        return (*before, 32 * blocks, rows)

    def dtype(self, name: str) -> np.dtype:
        """bfloat16 where it is this format."""
        return np.dtype(ml_dtypes.bfloat16) if name in self._packed else self._tensors.dtype(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the first axis."""
        if name not in self._packed:
            return self._tensors.read_rows(name, start, stop)
        blocks, scales = (self._tensors.read_bytes(name + end, start, stop) for end in (BLOCKS, SCALES))
        return dequantized(blocks, scales).swapaxes(-1, -2)


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8[…, B, 16] and uint8[…, B] -> bfloat16[…, 32 B]."""
    values = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
    values = values.reshape(*scales.shape, 32)
    scaled = np.ldexp(values, scales[..., None].astype(np.int32) - BIAS)
    return scaled.astype(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)
