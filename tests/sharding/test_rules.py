"""Axis rules and meshes: what goes where, and what is refused."""

import jax
import pytest
from jax.sharding import PartitionSpec

from xlane.sharding.mesh import MeshError, make_placement
from xlane.sharding.rules import fitted, partition


def test_logical_axes_become_mesh_axes():
    assert partition(("kv_heads", None, None, None)) == PartitionSpec("model", None, None, None)
    assert partition(("tokens", "vocab")) == PartitionSpec("data", "model")
    assert partition(()) == PartitionSpec()


def test_an_unknown_axis_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown logical axis 'layers'; known: tokens, kv_heads"):
        partition(("layers",))


def test_one_mesh_axis_cannot_split_two_dimensions():
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        partition(("heads", "ffn"))


@pytest.mark.parametrize(
    ("vocab", "split"), [(50257, None), (50258, "model"), (1, None), (0, "model")], ids=str
)
def test_what_does_not_divide_is_whole_on_every_device(vocab: int, split: str | None):
    spec = fitted(PartitionSpec("model", None), (vocab, 64), {"data": 1, "model": 2})
    assert spec == PartitionSpec(split, None)


@pytest.mark.parametrize(("experts", "split"), [(8, ("data", "model")), (6, "model"), (5, None)], ids=str)
def test_experts_lie_over_as_many_devices_as_their_number_allows(
    experts: int, split: str | tuple[str, ...] | None
):
    sizes = {"data": 2, "model": 2}
    assert fitted(partition(("experts", None)), (experts, 3), sizes) == PartitionSpec(split, None)


def test_a_mesh_is_a_grid_of_data_and_model():
    placement = make_placement(2, 4)
    assert (placement.data_size, placement.model_size, placement.single) == (2, 4, False)
    assert placement.mesh.devices.tolist() == [jax.devices()[:4], jax.devices()[4:]]
    assert make_placement(1, 1).single


def test_model_takes_the_devices_that_data_leaves():
    assert make_placement(2).model_size == 4
    assert make_placement(1, devices=jax.devices()[:3]).model_size == 3


@pytest.mark.parametrize(("data", "model"), [(3, 3), (9, None), (1, 9), (0, 1), (1, 0)])
def test_too_few_devices_are_refused_with_both_numbers(data: int, model: int | None):
    with pytest.raises(MeshError, match=r"needs \d+ devices, but there are 8: lower --data-parallel"):
        make_placement(data, model)


def test_a_placed_array_lies_as_its_axes_say():
    placement = make_placement(2, 4)
    heads = placement.sharding(("kv_heads", None))
    assert heads.shard_shape((8, 6)) == (2, 6)
    assert placement.fitted(("kv_heads", None), (6, 6)).shard_shape((6, 6)) == (6, 6)
    assert placement.replicated.shard_shape((8, 6)) == (8, 6)


def test_constraints_hold_while_tracing_where_sizes_allow():
    placement = make_placement(2, 4)

    @jax.jit
    def lay(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return placement.constrain(x, ("tokens", "ffn")), placement.everywhere(x)

    split, whole = lay(jax.numpy.zeros((3, 8)))
    assert split.sharding.shard_shape((3, 8)) == (3, 2)
    assert whole.sharding.is_fully_replicated
