"""Devices arranged as a grid of (data, model), and how arrays are laid on it. Knows axis names, not layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from .rules import fitted, partition


class MeshError(Exception):
    """The devices at hand cannot be arranged as asked."""


@dataclass(frozen=True)
class Placement:
    """A mesh with the rule table applied: says where each array goes."""

    mesh: Mesh | AbstractMesh

    @property
    def device(self) -> Any:
        """The first device of this process. Raises MeshError where there are none."""
        if isinstance(self.mesh, AbstractMesh):
            raise MeshError("an imagined placement has no devices")
        return self.mesh.local_devices[0]

    @property
    def data_size(self) -> int:
        """Devices along `data`."""
        return self.mesh.shape["data"]

    @property
    def model_size(self) -> int:
        """Devices along `model`."""
        return self.mesh.shape["model"]

    @property
    def single(self) -> bool:
        """One device in all: kernels that know nothing of meshes may be used."""
        return self.mesh.size == 1

    def sharding(self, axes: tuple[str | None, ...]) -> NamedSharding:
        """The sharding of an array with these logical axes, each of which must divide."""
        return NamedSharding(self.mesh, partition(axes))

    def fitted(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """The same for an array of this shape: what does not divide is not split."""
        return NamedSharding(self.mesh, fitted(partition(axes), shape, self.mesh.shape))

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, array: np.ndarray) -> jax.Array:
        """The same array on every device. Of several processes, each calls it with the same one."""
        if self.replicated.is_fully_addressable:
            return jax.device_put(array, self.replicated)
        return jax.make_array_from_callback(array.shape, self.replicated, lambda index: array)

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """While tracing: lay x out like this, where the sizes allow it."""
        return jax.lax.with_sharding_constraint(x, self.fitted(axes, x.shape))

    def by_vocab(self, logits: jax.Array) -> jax.Array:
        """While tracing: [R, V] split over the vocabulary, where it divides."""
        return self.constrain(logits, ("tokens", "vocab"))

    def by_rows(self, logits: jax.Array) -> jax.Array:
        """While tracing: [R, V] with each row whole, the rows spread over as many devices as their number allows."""
        rows = logits.shape[0]
        over = (
            ("data", "model")
            if rows % self.mesh.size == 0
            else "data"
            if rows % self.data_size == 0
            else None
        )
        return jax.lax.with_sharding_constraint(logits, NamedSharding(self.mesh, PartitionSpec(over, None)))

    def over_experts(
        self, compute: Callable[..., jax.Array], rows: tuple[jax.Array, ...], stacks: tuple[Any, ...]
    ) -> jax.Array:
        """While tracing: add up what every device makes of the experts it holds.

        `compute(first, rows, stacks)` gets the number of its first expert, all experts' `rows` [T, …] of its part of the
        launch and its own experts' part of `stacks`, pytrees of [X, …], and returns [T, …].
        """
        by_row = fitted(partition(("tokens",)), rows[0].shape[:1], self.mesh.shape)
        by_expert = fitted(partition(("experts",)), jax.tree.leaves(stacks)[0].shape[:1], self.mesh.shape)
        axes = by_expert[0]
        # Rows of other parts of the launch go to experts that lie here, too.
        gathered = by_row[0] == "data" and "data" in axes

        def here(rows: tuple[jax.Array, ...], stacks: tuple[Any, ...]) -> jax.Array:
            first = jax.lax.axis_index(axes) * jax.tree.leaves(stacks)[0].shape[0]
            if not gathered:
                return jax.lax.psum(compute(first, rows, stacks), axes)
            rows = jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), rows)
            out = jax.lax.psum_scatter(compute(first, rows, stacks), "data", tiled=True)
            return jax.lax.psum(out, "model")

        return jax.shard_map(
            here, mesh=self.mesh, in_specs=(by_row, by_expert), out_specs=by_row, check_vma=False
        )(rows, stacks)

    def everywhere(self, tree: Any) -> Any:
        """While tracing: give every device the whole of these arrays."""
        return jax.lax.with_sharding_constraint(tree, self.replicated)


def make_placement(
    data: int = 1, model: int | None = None, devices: Sequence[Any] | None = None
) -> Placement:
    """A (data, model) mesh over the first data*model devices; `model` None takes all that are left.

    Raises MeshError if there are too few devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    data, model = _sides(data, model, len(devices))
    left_out = {d.process_index for d in devices} - {d.process_index for d in devices[: data * model]}
    if left_out:
        raise MeshError(
            f"a mesh of data={data} x model={model} leaves out all devices of process {min(left_out)}: "
            f"{len(devices)} devices are there; raise --data-parallel or --num-shard, or start fewer processes"
        )
    return Placement(Mesh(np.array(devices[: data * model]).reshape(data, model), ("data", "model")))


def imagined_placement(data: int, model: int | None, count: int) -> Placement:
    """The same over `count` devices that nobody here has: sizes can be asked of it, and nothing can be compiled or put."""
    return Placement(AbstractMesh(_sides(data, model, count), ("data", "model")))


def _sides(data: int, model: int | None, count: int) -> tuple[int, int]:
    model = max(1, count // data) if model is None else model
    if data < 1 or model < 1 or data * model > count:
        raise MeshError(
            f"a mesh of data={data} x model={model} needs {data * model} devices, but there are {count}: "
            "lower --data-parallel or --num-shard"
        )
    return data, model
