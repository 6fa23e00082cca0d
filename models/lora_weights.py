"""The two arrays that a linear map has for adapters, made of the adapters' files: all slots at the start, or one of them later.

Knows what lies where in them (`lora.py` tells the layout); not which adapter is in which slot, nor devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .config import Lora
from .errors import CheckpointError
from .lora import Adapter, Maps, check_known
from .spec import ParamSpec
from .weights import Index, WeightSource, assemble, refuse_if_any

A, B = ".lora_a", ".lora_b"
"""What the paths of the two parameters of a linear map end with."""


def is_adapters(spec: ParamSpec) -> bool:
    """Whether this parameter is what adapters add."""
    return spec.path.endswith((A, B))


@dataclass(frozen=True, slots=True)
class AdapterArrays:
    """What adapters' tensors become."""

    maps: Maps
    rank: int
    """Of a slot."""

    @classmethod
    def of(cls, lora: Lora, maps: Maps) -> "AdapterArrays":
        """Those that a model with these adapters has."""
        return cls({path: maps[path] for path, _ in lora.maps}, lora.rank)

    def check(self, adapters: Sequence[Adapter], specs: Sequence[ParamSpec]) -> None:
        """Raise CheckpointError unless slots of these parameters can hold these adapters."""
        for adapter in adapters:
            if adapter.rank > self.rank:
                raise CheckpointError(
                    f"adapter {adapter.name} has rank {adapter.rank}, and its slot holds {self.rank} (--lora-adapters rank=N)"
                )
        check_known(adapters, {_map(spec): self.maps[_map(spec)] for spec in specs})
        refuse_if_any(
            [problem for spec in specs for adapter in adapters for problem in self._misfits(spec, adapter)]
        )

    def read(self, spec: ParamSpec, adapters: Sequence[Adapter], index: Index) -> np.ndarray:
        """A slice of a parameter with these adapters in the first slots and nothing in the others. Raises CheckpointError for a
        number that is not finite as it is stored, which would reach the tokens of other adapters."""
        recipe, *_ = self.maps[_map(spec)]
        named = [(adapter, self._names(spec, adapter)) for adapter in adapters]
        parts = len(recipe.names)
        if spec.path.endswith(A):
            slots = spec.shape[0] // (parts * self.rank)
            out = np.zeros((slots, parts, self.rank, spec.shape[-1]), np.float32)
            for slot, (adapter, names) in enumerate(named):
                for part, name in enumerate(names):
                    if adapter.changes(name):
                        rows = _rows(adapter, name, "lora_A", 0, adapter.rank, spec.dtype)
                        out[slot, part, : adapter.rank] = rows
            return out.reshape(spec.shape)[index].astype(spec.dtype)
        up = _Up(named, recipe.names, spec.shape[-1] // (parts * self.rank), self.rank, spec.dtype)
        return assemble(recipe, up, spec, index)

    def read_slot(self, spec: ParamSpec, adapter: Adapter) -> tuple[np.ndarray, int]:
        """What a slot of a parameter holds for an adapter, and the axis of the parameter along which slots lie."""
        axis = 0 if spec.path.endswith(A) else len(spec.shape) - 1
        ranks = len(self.maps[_map(spec)][0].names) * self.rank
        of_slot = replace(spec, shape=(*spec.shape[:axis], ranks, *spec.shape[axis + 1 :]))
        return self.read(of_slot, [adapter], tuple(slice(0, size) for size in of_slot.shape)), axis

    def _names(self, spec: ParamSpec, adapter: Adapter) -> tuple[str, ...]:
        """What the tensors of a map are called of which this adapter changes one."""
        first, *others = (one.names for one in self.maps[_map(spec)])
        return next((names for names in others if any(map(adapter.changes, names))), first)

    def _misfits(self, spec: ParamSpec, adapter: Adapter) -> list[str]:
        """What of this adapter's tensors does not fit a parameter."""
        recipe, names = self.maps[_map(spec)][0], self._names(spec, adapter)
        sizes = [source[0] for source in recipe.source_shapes(spec.shape)] if spec.path.endswith(B) else []
        problems: list[str] = []
        for number, name in enumerate(names):
            if not adapter.changes(name):
                continue
            part, shape = ("lora_A", (adapter.rank, spec.shape[-1]))
            if spec.path.endswith(B):
                part, shape = "lora_B", (sizes[number], adapter.rank)
            tensor = adapter.tensor(name, part)
            found = adapter.tensors.shape(tensor) if tensor in adapter.tensors.names() else "missing"
            if found != shape:
                problems.append(f"adapter {adapter.name}: tensor {tensor} is {found}, expected {shape}")
        return problems


class AdaptedWeights:
    """A `WeightSource` of a model with adapters."""

    def __init__(self, weights: WeightSource, arrays: AdapterArrays, adapters: Sequence[Adapter]) -> None:
        self.arrays = arrays
        self._weights, self._adapters = weights, adapters

    def check(self, specs: Sequence[ParamSpec]) -> None:
        """See `WeightSource.check`; each adapter's tensors must fit the model's."""
        self._weights.check([spec for spec in specs if not is_adapters(spec)])
        self.arrays.check(self._adapters, [spec for spec in specs if is_adapters(spec)])

    def read(self, spec: ParamSpec, index: Index) -> np.ndarray:
        """See `WeightSource.read`."""
        if is_adapters(spec):
            return self.arrays.read(spec, self._adapters, index)
        return self._weights.read(spec, index)

    def by_entry(self, spec: ParamSpec) -> bool:
        """See `WeightSource.by_entry`."""
        return not is_adapters(spec) and self._weights.by_entry(spec)

    def read_parts(self, spec: ParamSpec, index: Index) -> list[np.ndarray]:
        """See `WeightSource.read_parts`."""
        return self._weights.read_parts(spec, index)


@dataclass(frozen=True, slots=True)
class _Up:
    """Rows of the B of all slots beside each other, under the names of the model's own tensors."""

    adapters: Sequence[tuple[Adapter, tuple[str, ...]]]
    """Each with what it calls the tensors of `names`."""
    names: tuple[str, ...]
    slots: int
    rank: int
    dtype: str
    """As which they are stored."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Never asked: rows lie as they are."""
        raise NotImplementedError(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32[rows, S * P * r]."""
        out = np.zeros((stop - start, self.slots, len(self.names), self.rank), np.float32)
        part = self.names.index(name)
        for slot, (adapter, own) in enumerate(self.adapters):
            if adapter.changes(own[part]):
                rows = _rows(adapter, own[part], "lora_B", start, stop, self.dtype, adapter.scale)
                out[:, slot, part, : adapter.rank] = rows
        return out.reshape(stop - start, -1)


def _map(spec: ParamSpec) -> str:
    return spec.path[: -len(A)]


def _rows(
    adapter: Adapter, name: str, part: str, start: int, stop: int, dtype: str, scale: float = 1.0
) -> np.ndarray:
    """[rows, …] of a tensor of an adapter, times a scale. Raises CheckpointError."""
    tensor = adapter.tensor(name, part)
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
        rows = adapter.tensors.read_rows(tensor, start, stop).astype(np.float32) * np.float32(scale)
        rows = rows.astype(dtype)
    if not np.isfinite(rows).all():
        scaled = "" if scale == 1.0 else f" times its scale of {scale:g} (lora_alpha)"
        raise CheckpointError(
            f"adapter {adapter.name}: tensor {tensor}{scaled} has numbers that are not finite in {dtype}"
        )
    return rows
