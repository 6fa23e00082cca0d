"""FP8 weights with their scales as if they were stored in float32, and as the engine's own leaf. Knows the layouts, and neither
files nor parameters.

A tensor `x.weight` of float8_e4m3fn is scaled by `x.weight_scale_inv`, one number a block of 128 by 128 (DeepSeek-V3, Qwen 3;
a factor in spite of its name), or by `x.weight_scale`, one a row or one in all (compressed-tensors). FP8 tensors without a
scale are values as they are. What scales activations (`x.input_scale`, `x.activation_scale`) is left out: they are not rounded here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .errors import CheckpointError
from .spec import Quant
from .weights import LeafSource, Rows, TensorSource

BLOCK = 128
ENDS = ("_scale_inv", "_scale")
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


class Fp8Tensors:
    """A `TensorSource` and `LeafSource` that passes on what is not in this format."""

    def __init__(self, tensors: TensorSource, others: LeafSource | None = None) -> None:
        """`others` are the tensors that are in few bits of other kinds."""
        self._tensors, self._others = tensors, others
        names = frozenset(tensors.names())
        weights = (name for name in names if name.endswith(".weight"))
        scaled = {name: name + end for name in weights for end in ENDS if name + end in names}
        self._scales = {name: scale for name, scale in scaled.items() if tensors.dtype(name) == FP8}
        self._inputs = {
            name.removesuffix("weight") + end
            for name in self._scales
            for end in ("input_scale", "activation_scale")
        }

    def names(self) -> Iterable[str]:
        """Every tensor but the scales."""
        hidden = {*self._scales.values(), *self._inputs}
        return [name for name in self._tensors.names() if name not in hidden]

    def where(self, name: str) -> str:
        """The file a tensor lies in."""
        return self._tensors.where(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored."""
        return self._tensors.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """float32 where there is a scale that fits; raises CheckpointError where it does not."""
        if name not in self._scales:
            return self._tensors.dtype(name)
        shape, scale = self._tensors.shape(name), self._tensors.shape(self._scales[name])
        if scale not in ((), (1,), (shape[0],), (shape[0], 1), _blocks(shape)):
            raise CheckpointError(
                f"{self.where(name)}: tensor {name} {shape} has a scale {scale}; supported are one in all, one a row, "
                f"and one a block of {BLOCK} by {BLOCK}"
            )
        return np.dtype(np.float32)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the first axis."""
        rows = self._tensors.read_rows(name, start, stop)
        if name not in self._scales:
            return rows
        factors = self.factors(name, start, stop)
        if factors.shape[1] > 1:
            factors = factors[:, np.arange(rows.shape[1]) // BLOCK]
        return rows.astype(np.float32) * factors

    def values(self, name: str, start: int, stop: int) -> np.ndarray:
        """float8_e4m3fn[rows, D]."""
        return self._tensors.read_rows(name, start, stop)

    def factors(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32[rows, 1], or one for each block of inputs."""
        shape, scale = self._tensors.shape(name), self._scales[name]
        stored = self._tensors.shape(scale)
        factors = self._tensors.read_rows(scale, 0, stored[0] if stored else 1).astype(np.float32)
        if factors.size == 1:
            return np.full((stop - start, 1), factors.reshape(-1)[0])
        if stored == _blocks(shape):
            return factors[np.arange(start, stop) // BLOCK]
        return factors.reshape(-1, 1)[start:stop]

    def holds(self, name: str, quant: Quant, group: int) -> bool:
        """See `LeafSource.holds`."""
        if quant != "fp8":
            return self._others is not None and self._others.holds(name, quant, group)
        if name not in self._scales or len(self._tensors.shape(name)) != 2:
            return False
        shape, scale = self._tensors.shape(name), self._tensors.shape(self._scales[name])
        if group:
            return group == BLOCK and scale == _blocks(shape)
        return scale in ((), (1,), (shape[0],), (shape[0], 1))

    def leaf(self, quant: Quant, part: int) -> Rows:
        """See `LeafSource.leaf`."""
        if quant == "fp8":
            return _Leaf(self, part)
        assert self._others is not None, "it holds one"
        return self._others.leaf(quant, part)

    def order(self, name: str) -> np.ndarray:
        """See `LeafSource.order`; FP8 has none of its own."""
        assert self._others is not None, "it holds one"
        return self._others.order(name)

    def is_nothing(self, name: str) -> bool:
        """See `LeafSource.is_nothing`."""
        return self._others is not None and self._others.is_nothing(name)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Values or scales of all of these weights, row by row."""

    tensors: Fp8Tensors
    part: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        return self.tensors.shape(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the outputs."""
        read = self.tensors.factors if self.part else self.tensors.values
        return read(name, start, stop)


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in shape)
