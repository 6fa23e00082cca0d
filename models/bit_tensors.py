"""The tensors of GPTQ, AWQ and compressed-tensors as if they were stored in float32, and as the engine's own leaves.

A linear map `x` has no `x.weight` in such a checkpoint but several tensors (all integers of 32 bits hold their values lowest
bits first; G groups of inputs, N outputs, D inputs):

    gptq    x.qweight [D * bits/32, N], x.qzeros [G, N * bits/32], x.scales [G, N], perhaps x.g_idx [D]
    awq     x.qweight [D, N/8], x.qzeros [G, N/8], x.scales [G, N]; the eight outputs of a word in the order of AWQ_ORDER
    words   x.weight_packed [N, D * bits/32], x.weight_scale [N, G], perhaps x.weight_zero_point [N * bits/32, G] and
            x.weight_g_idx [D]
    bytes   x.weight int8[N, D], x.weight_scale [N, G], perhaps x.weight_zero_point int8[N, G]

Knows the layouts and the leaves; which module has which layout is `schemes.py`'s, what weights mean the decoder's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import ml_dtypes
import numpy as np

from .errors import CheckpointError
from .schemes import Scheme, Schemes
from .spec import GROUP, Quant, paired
from .weights import TensorSource

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs the values of a word belong to, from the lowest four bits up."""
_AWQ_PLACE = np.argsort(AWQ_ORDER)
_PIECES = {
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "awq": ("qweight", "scales", "qzeros", "g_idx"),
    "words": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
    "bytes": ("weight", "weight_scale", "weight_zero_point", "weight_g_idx"),
    "fp8": ("weight",),
}
"""Values, scales, zero points, groups by index, and what says nothing new."""
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


class MappedSource(TensorSource, Protocol):
    """A `TensorSource` that also shows tensors of whole numbers, and parts of tensors that are not rows."""

    def mapped(self, name: str) -> np.ndarray:
        """The whole tensor in its own type, which lies in the file until it is looked at. Not to be kept."""
        ...


class BitTensors:
    """A `TensorSource` that passes on what is not in these formats."""

    def __init__(self, tensors: MappedSource, schemes: Schemes) -> None:
        """Find the modules by their tensors. Raises CheckpointError where config.json does not say what they are."""
        self._tensors = tensors
        names = frozenset(tensors.names())
        self._maps: dict[str, _Map] = {}
        hidden: set[str] = set()
        for name in names:
            module, _, piece = name.rpartition(".")
            if piece not in ("qweight", "weight_packed", "weight"):
                continue
            scheme = schemes.of(module)
            if piece == "weight" and (
                scheme is None or scheme.layout != "bytes" or not _whole(tensors, name)
            ):
                continue
            if scheme is None or _PIECES[scheme.layout][0] != piece:
                raise CheckpointError(
                    f"{tensors.where(name)}: tensor {name} is no part of what config.json's quantization_config says of {module}"
                )
            self._maps[module + ".weight"] = _Map(tensors, module, scheme, names)
            hidden.update(f"{module}.{piece}" for piece in (*_PIECES[scheme.layout], *_OF_ACTIVATIONS))
        self._names = (*self._maps, *(names - hidden))

    def names(self) -> Iterable[str]:
        """Every tensor, a linear map's under one name."""
        return self._names

    def where(self, name: str) -> str:
        """The file a tensor lies in."""
        return self._tensors.where(self._maps[name].values if name in self._maps else name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Outputs first."""
        return self._maps[name].shape if name in self._maps else self._tensors.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """float32 where it is in these formats; raises CheckpointError where its tensors do not fit each other."""
        if name not in self._maps:
            return self._tensors.dtype(name)
        self._maps[name].check()
        return np.dtype(np.float32)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the first axis."""
        if name not in self._maps:
            return self._tensors.read_rows(name, start, stop)
        return self._maps[name].in_full(start, stop)

    def holds(self, name: str, quant: Quant, group: int) -> bool:
        """Whether a tensor is in these formats, so that this leaf holds it."""
        scheme = self._maps[name].scheme if name in self._maps else None
        return scheme is not None and (scheme.leaf, scheme.leaf_group) == (quant, group)

    def leaf(self, quant: Quant, part: int) -> "Leaf":
        """One of the arrays of a leaf (`spec.Quantized`), of every such tensor."""
        return Leaf(self._maps, quant, part)

    def order(self, name: str) -> np.ndarray:
        """int32[D]: the inputs of a linear map sorted by group."""
        return self._maps[name].order

    def is_nothing(self, name: str) -> bool:
        """A bias of zeros beside such a map, as old writers left for models that have none."""
        if name.removesuffix("bias") + "weight" not in self._maps:
            return False
        return not self._tensors.mapped(name).astype(np.float32).any()


def _whole(tensors: MappedSource, name: str) -> bool:
    return tensors.mapped(name).dtype == np.int8


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of the engine's leaves, row by row."""

    maps: "Mapping[str, _Map]"
    quant: Quant
    part: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        return self.maps[name].shape

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the outputs."""
        one = self.maps[name]
        if self.quant == "int8" and self.part:
            return one.scales(start, stop)
        if self.part == 0:
            steps = one.bytes(start, stop) if self.quant == "int8" else one.steps(start, stop)
            order = one.order  # asked for in any case: it tells of groups that are not what was said
            steps = steps[:, order] if one.scheme.by_index else steps
            return steps if self.quant == "int8" else paired(steps)
        return one.group_scales(start, stop) if self.part == 1 else one.group_floors(start, stop)


class _Map:
    """One linear map."""

    def __init__(self, tensors: MappedSource, module: str, scheme: Scheme, names: frozenset[str]) -> None:
        self._tensors, self.scheme, self._module = tensors, scheme, module
        pieces = (f"{module}.{piece}" for piece in _PIECES[scheme.layout])
        self.values, self._scales, zeros, index, *_ = pieces
        self._zeros, self._index = (name if name in names else None for name in (zeros, index))
        self._names = names

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, inputs."""
        first, last = self._tensors.shape(self.values)
        each = 32 // self.scheme.bits
        match self.scheme.layout:
            case "gptq":
                return last, first * each
            case "awq":
                return last * each, first
            case "words":
                return first, last * each
            case _:
                return first, last

    def check(self) -> None:
        """Raise CheckpointError unless scales, zero points and index are there and of the right shape."""
        outputs, inputs = self.shape
        groups, each = -(-inputs // (self.scheme.group or inputs)), 32 // self.scheme.bits
        turned = self.scheme.layout in ("gptq", "awq")
        scales = (
            [(groups, outputs)]
            if turned
            else [(outputs, groups), *([(outputs,), (1,)] if groups == 1 else [])]
        )
        zeros = [(groups, outputs // each)] if turned else [(-(-outputs // each), groups), *scales]
        self._fits(self._scales, *scales)
        if self._zeros is not None:
            self._fits(self._zeros, *zeros)
        elif turned or not self.scheme.symmetric:
            raise CheckpointError(f"{self._where}: {self._module} has no tensor of zero points")
        if self._index is not None:
            self._fits(self._index, (inputs,))
        elif self.scheme.by_index:
            raise CheckpointError(f"{self._where}: {self._module} has no tensor of groups by index (g_idx)")

    def _fits(self, name: str, *shapes: tuple[int, ...]) -> None:
        if name not in self._names or self._tensors.shape(name) not in shapes:
            found = self._tensors.shape(name) if name in self._names else "missing"
            raise CheckpointError(
                f"{self._where}: tensor {name} is {found}; beside {self.values} {self._tensors.shape(self.values)} "
                f"quantization_config asks for {shapes[0]}"
            )

    @property
    def _where(self) -> str:
        return self._tensors.where(self.values)

    def steps(self, start: int, stop: int) -> np.ndarray:
        """uint8[rows, D]: values as they are counted, from 0 up."""
        stored, bits = self._tensors.mapped(self.values), self.scheme.bits
        match self.scheme.layout:
            case "gptq":
                return _unpacked(stored[:, start:stop].T, bits)
            case "awq":
                return _awq_columns(stored, start, stop).T
            case "words":
                return _unpacked(stored[start:stop], bits)
            case _:
                return _counted(stored[start:stop], bits)

    @cached_property
    def group_of(self) -> np.ndarray:
        """int32[D]: the group of each input."""
        inputs = self.shape[1]
        if self._index is not None and self.scheme.group:
            return np.array(self._tensors.mapped(self._index), np.int32)
        return np.arange(inputs, dtype=np.int32) // np.int32(self.scheme.group or inputs)

    @cached_property
    def order(self) -> np.ndarray:
        """int32[D]: the inputs sorted by group, each of which must be of one size."""
        order = np.argsort(self.group_of, kind="stable").astype(np.int32)
        inputs, group = len(order), self.scheme.group or len(order)
        if not (self.group_of[order] == np.arange(inputs) // group).all():
            raise CheckpointError(
                f"{self._where}: {self._index} does not divide inputs into groups of {group}"
            )
        if not self.scheme.by_index and (order != np.arange(inputs)).any():
            raise CheckpointError(
                f"{self._where}: {self._index} puts inputs in another order, and quantization_config says they are in none"
            )
        return order

    def _grid(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """float32[rows, G] twice: scales, and zero points as they are counted."""
        scheme, stored = self.scheme, self._tensors.mapped(self._scales)
        if scheme.layout in ("gptq", "awq"):
            scales = stored[:, start:stop].T.astype(np.float32)
        else:
            scales = _by_output(stored, start, stop).astype(np.float32)
        if self._zeros is None:
            return scales, np.full_like(scales, 1 << (scheme.bits - 1))
        stored = self._tensors.mapped(self._zeros)
        if scheme.layout == "awq":
            zeros = _awq_columns(stored, start, stop).T
        elif stored.dtype == np.int8:
            zeros = _counted(_by_output(stored, start, stop), scheme.bits)
        else:
            words, each = stored if scheme.layout == "gptq" else stored.T, 32 // scheme.bits
            first = start // each
            zeros = _unpacked(words[:, first : -(-stop // each)], scheme.bits)
            zeros = zeros[:, start - first * each : stop - first * each].T
        return scales, zeros.astype(np.float32) + np.float32(scheme.zero_offset)

    def in_full(self, start: int, stop: int) -> np.ndarray:
        """float32[rows, D]."""
        scales, zeros = self._grid(start, stop)
        weight = self.steps(start, stop).astype(np.float32)
        weight -= zeros[:, self.group_of]
        weight *= scales[:, self.group_of]
        return weight

    def bytes(self, start: int, stop: int) -> np.ndarray:
        """int8[rows, D] around 0."""
        if (self._grid(start, stop)[1] != 128).any():
            raise CheckpointError(
                f"{self._where}: {self._zeros} has zero points, and quantization_config says that there are none"
            )
        return (self.steps(start, stop) ^ np.uint8(128)).view(np.int8)

    def scales(self, start: int, stop: int) -> np.ndarray:
        """float32[rows, G]."""
        return self._grid(start, stop)[0]

    def group_scales(self, start: int, stop: int) -> np.ndarray:
        """bfloat16[rows, D/GROUP]."""
        return self._repeated(self._grid(start, stop)[0].astype(ml_dtypes.bfloat16))

    def group_floors(self, start: int, stop: int) -> np.ndarray:
        """bfloat16[rows, D/GROUP]: what value 0 stands for, by the scales as they are kept, so that a weight of 0 is one."""
        scales, zeros = self._grid(start, stop)
        kept = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
        return self._repeated((-zeros * kept).astype(ml_dtypes.bfloat16))

    def _repeated(self, by_group: np.ndarray) -> np.ndarray:
        """One a group of the checkpoint's -> one for each GROUP inputs."""
        return np.repeat(by_group, (self.scheme.group or self.shape[1]) // GROUP, axis=1)


def _by_output(stored: np.ndarray, start: int, stop: int) -> np.ndarray:
    """One a group of each output, one an output or one in all -> [rows, G], [rows, 1]."""
    if stored.size == 1:
        return np.broadcast_to(stored.reshape(1, 1), (stop - start, 1))
    return stored[start:stop].reshape(stop - start, -1)


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """int32[…, W] -> uint8[…, W * 32 / bits], lowest bits first."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def _awq_columns(words: np.ndarray, start: int, stop: int) -> np.ndarray:
    """int32[R, W] -> columns start … stop-1 of the uint8[R, 8 W] that they hold, in their true order."""
    first = start // 8
    values = _unpacked(words[:, first : -(-stop // 8)], 4)
    values = values.reshape(len(values), -1, 8)[..., _AWQ_PLACE].reshape(len(values), -1)
    return values[:, start - 8 * first : stop - 8 * first]


def _counted(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed -> uint8 from 0 up."""
    return (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
