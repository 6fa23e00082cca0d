"""Which mesh axis each logical axis is split over: one table. Knows no array."""

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from .axes import LogicalAxis, MeshAxis

RULES: dict[LogicalAxis, MeshAxis | tuple[MeshAxis, ...]] = {
    "tokens": "data",
    "kv_heads": "model",
    "heads": "model",
    "ffn": "model",
    "experts": ("data", "model"),
    "vocab": "model",
}
"""Megatron's split (Shoeybi et al. 2019): outputs of qkv and gate/up, inputs of the projections back. Experts, which are most of
a model that has them, lie over all devices: an axis of their own would leave the rest of the layer with fewer."""


def partition(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes of an array -> the mesh axes it is split over.

    Raises ValueError for an unknown name, or two dimensions on one mesh axis.
    """
    names: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(RULES)}")
        names.append(None if axis is None else RULES[axis])
    used = [one for name in names for one in _each(name)]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} put two dimensions on one mesh axis: {names}")
    return PartitionSpec(*names)


def fitted(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec without the splits that would not come out even: such a dimension is whole on every device, and one that is
    split over several axes keeps the last of them that allow it.

    A vocabulary of 50257 is served by two devices in this way, at the price of a second copy. `sizes` are the mesh's.
    """

    def even(name: Any, size: int) -> str | tuple[str, ...] | None:
        axes = _each(name)
        while axes and size % math.prod(sizes[axis] for axis in axes):
            axes = axes[1:]
        return axes if len(axes) > 1 else axes[0] if axes else None

    return PartitionSpec(*(even(name, size) for name, size in zip(spec, shape, strict=True)))


def _each(name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension."""
    return () if name is None else (name,) if isinstance(name, str) else name
