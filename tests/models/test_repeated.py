"""Copies of kv heads, by hand: every member of every head, and that slices are cut out of the same."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.untrained import CONFIG
from xlane.models.registry import config_from_hf
from xlane.models.repeated import RepeatedHeads, for_devices
from xlane.models.spec import ParamSpec

HEADS, GROUP, COPIES, HEAD_DIM = 3, 4, 2, 5
ONCE = replace(config_from_hf(CONFIG), heads=HEADS * GROUP, kv_heads=HEADS, head_dim=HEAD_DIM)
CONFIGURED = for_devices(ONCE, HEADS * COPIES)


class Known:
    """A source whose every number is another one."""

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.arange(np.prod(shape)).reshape(shape)

    def check(self, specs) -> None:
        self.checked = [spec.shape for spec in specs]

    def by_entry(self, spec: ParamSpec) -> bool:
        return False

    def read(self, spec: ParamSpec, index) -> np.ndarray:
        return self.array(spec.shape)[tuple(index)]

    def read_parts(self, spec: ParamSpec, index) -> list[np.ndarray]:
        return [self.read(spec, index), self.read(spec, index)[..., :1]]


def spec(name: str, *shape: int) -> ParamSpec:
    axes = ("kv_heads" if len(shape) > 1 and name != "out.weight" else None, *[None] * (len(shape) - 1))
    return ParamSpec(f"layers.1.{name}", shape, "float32", axes)


SHARE = GROUP // COPIES
BY_HEAD = {
    # parameter: its shape, and how many of a head's members are queries, in the checkpoint and here
    "qkv.weight": ((HEADS * COPIES, SHARE + 2, HEAD_DIM, 7), GROUP, SHARE),
    "qkv.bias": ((HEADS * COPIES, SHARE + 2, HEAD_DIM), GROUP, SHARE),
    "q_norm.scale": ((HEADS * COPIES, SHARE, HEAD_DIM), GROUP, SHARE),
    "k_norm.scale": ((HEADS * COPIES, 1, HEAD_DIM), 0, 0),
    "sinks": ((HEADS * COPIES, SHARE), GROUP, SHARE),
}


@pytest.mark.parametrize("name", BY_HEAD)
def test_queries_are_shared_out_and_keys_are_there_for_each(name: str):
    shape, group, share = BY_HEAD[name]
    source = RepeatedHeads(known := Known(), CONFIGURED)
    source.check([spec(name, *shape)])
    (once,) = known.checked
    assert once == (HEADS, group + shape[1] - share, *shape[2:])
    original = known.array(once)
    whole = source.read(spec(name, *shape), tuple(slice(0, size) for size in shape))
    for head in range(HEADS * COPIES):
        mother, turn = divmod(head, COPIES)
        for member in range(shape[1]):
            of_mother = turn * share + member if member < share else group + member - share
            np.testing.assert_array_equal(whole[head, member], original[mother, of_mother])
    cut = (slice(1, 4), slice(0, 1), *(slice(0, size) for size in shape[2:]))
    np.testing.assert_array_equal(source.read(spec(name, *shape), cut), whole[cut])
    if name == "qkv.weight":
        values, scales = source.read_parts(spec(name, *shape), cut)
        np.testing.assert_array_equal(values, whole[cut])
        np.testing.assert_array_equal(scales, whole[cut][..., :1])


def test_what_has_no_kv_heads_is_as_it_is_and_a_row_of_all_keys_is_repeated():
    source = RepeatedHeads(known := Known(), replace(CONFIGURED, qk_norm="row"))
    for name, shape in (("out.weight", (6, 8)), ("q_norm.scale", (HEADS * GROUP * HEAD_DIM,))):
        np.testing.assert_array_equal(source.read(spec(name, *shape), (slice(None),)), known.array(shape))
    row = source.read(spec("k_norm.scale", HEADS * COPIES * HEAD_DIM), (slice(None),))
    heads = row.reshape(HEADS, COPIES, HEAD_DIM)
    np.testing.assert_array_equal(heads[:, 0], known.array((HEADS, HEAD_DIM)))
    np.testing.assert_array_equal(heads[:, 1], heads[:, 0])


@pytest.mark.parametrize(("devices", "copies"), [(1, 1), (3, 1), (6, 2), (12, 4), (4, 1), (24, 1)])
def test_heads_are_repeated_where_they_divide(devices: int, copies: int):
    made = for_devices(ONCE, devices)
    assert (made.kv_copies, made.kv_heads) == (copies, HEADS * copies)
