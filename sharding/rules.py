"""Which mesh axis each logical axis is split over: one table. Knows no array."""

from collections.abc import Mapping

from jax.sharding import PartitionSpec

from .axes import LogicalAxis, MeshAxis

RULES: dict[LogicalAxis, MeshAxis] = {
    "tokens": "data",
    "kv_heads": "model",
    "heads": "model",
    "ffn": "model",
    "experts": "model",
    "vocab": "model",
}
"""Megatron's split (Shoeybi et al. 2019): outputs of qkv and gate/up, inputs of the projections back."""


def partition(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes of an array -> the mesh axes it is split over.

    Raises ValueError for an unknown name, or two dimensions on one mesh axis.
    """
    names: list[str | None] = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(RULES)}")
        names.append(None if axis is None else RULES[axis])
    used = [name for name in names if name is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} put two dimensions on one mesh axis: {names}")
    return PartitionSpec(*names)


def fitted(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec without the splits that would not come out even: such a dimension is whole on every device.

    A vocabulary of 50257 is served by two devices in this way, at the price of a second copy. `sizes` are the mesh's.
    """
    return PartitionSpec(
        *(
            name if name is not None and size % sizes[str(name)] == 0 else None
            for name, size in zip(spec, shape, strict=True)
        )
    )
