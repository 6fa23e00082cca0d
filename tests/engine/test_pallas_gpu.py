"""The GPU's attention kernels, interpreted, against plain XLA: over page borders, head counts and sizes, windows and caps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlane.engine.kernels.pallas_gpu import PallasGpuKernels, _splits
from xlane.models.attention import XlaKernels
from xlane.models.kernels import KvLayer, PagedBatch
from xlane.sharding.mesh import Placement, make_placement

pytestmark = pytest.mark.slow

INTERPRET = jax.default_backend() != "gpu"
"""On a GPU the kernels themselves are tested: `JAX_PLATFORMS=cuda pytest tests/engine/test_pallas_gpu.py`."""

PAGES, WIDTH = 40, 16
NOBODYS = PAGES - 1
"""A page full of NaN, that stands wherever a row holds nothing."""

DECODE = ([70, 65, -1, 127, 0], [0, 1, 2, 3, 4], 5)
PREFILL = (
    [*range(30, 60), *range(25), *range(100, 128), 0, *[-1] * 5],
    [0] * 30 + [1] * 25 + [3] * 28 + [4] * 6,
    0,
)
MIXED = ([70, -1, 35, *range(20, 45), *range(9), -1], [0, 1, 2, *[3] * 25, *[4] * 10], 3)
LONG = (
    [*range(127, 191), *range(126, 158), *range(300, 420), *range(254, 286)],
    [0] * 64 + [1] * 32 + [2] * 120 + [3] * 32,
    0,
)
"""A prompt program's 32 tokens of 4 heads see one block of 128 keys whole, none but for one key, two; and share a program."""

KINDS = {
    "plain": (2, 4, 16, {}),
    "one head a kv head": (4, 1, 16, {}),
    "odd heads and width": (2, 3, 24, {}),
    "all heads share": (1, 8, 64, {}),
    "wide": (1, 2, 128, {}),
    "widest": (1, 2, 256, {}),
    "window": (2, 2, 16, {"window": 20}),
    "window of one page": (2, 2, 16, {"window": 8}),
    "softcap": (2, 2, 16, {"softcap": 2.0}),
    "slopes": (2, 3, 16, {"slopes": (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)}),
    "sinks": (2, 3, 16, {"sinks": np.linspace(-1, 4, 6).reshape(2, 3)}),
    "in 8 bits": (2, 3, 24, {"int8": True}),
    "all": (
        2,
        2,
        16,
        {
            "window": 30,
            "softcap": 3.0,
            "slopes": (0.4, 0.3, 0.2, 0.1),
            "sinks": np.ones((2, 2)),
            "int8": True,
        },
    ),
}


def _in_8_bits(pools: np.ndarray) -> KvLayer:
    """[2, K, P, W, H] rounded, with a scale for each head of each token; what is NaN has a scale that is."""
    scales = np.abs(pools).max(axis=-1) / 127
    steps = np.nan_to_num(np.rint(pools / scales[..., None])).astype(np.int8)
    return KvLayer(*map(jnp.asarray, (*steps, *scales)))


def _launch(kv_heads: int, group: int, head_dim: int, page_tokens: int, where: tuple, int8: bool):
    """qkv, pool and batch as a step has them; what no row holds is NaN."""
    positions, rows, _ = where
    rng = np.random.default_rng(0)
    count = max(rows) + 1
    table = np.full((count, WIDTH), NOBODYS)
    free = iter(rng.permutation(PAGES - 1))
    for row in range(count):
        held = max((p + 1 for p, r in zip(positions, rows, strict=True) if r == row), default=0)
        for index in range(-(-held // page_tokens)):
            table[row, index] = next(free)
    pools = rng.normal(size=(2, kv_heads, PAGES, page_tokens, head_dim)).astype(np.float32)
    pools[:, :, NOBODYS] = np.nan
    qkv = rng.normal(size=(len(positions), kv_heads, group + 2, head_dim)).astype(np.float32)
    batch = PagedBatch(*(jnp.asarray(x, jnp.int32) for x in (positions, rows, table)))
    return jnp.asarray(qkv), _in_8_bits(pools) if int8 else KvLayer(*map(jnp.asarray, pools)), batch


@pytest.fixture(autouse=True)
def exact_products():
    """A GPU would round the reference's operands."""
    with jax.default_matmul_precision("highest"):
        yield


def _compared(kernels, where: tuple, shape: tuple[int, int, int], page_tokens: int, options: dict):
    options = {"window": None, **options}
    if "sinks" in options:
        options["sinks"] = jnp.asarray(options["sinks"], jnp.float32)
    launch = _launch(*shape, page_tokens, where, options.pop("int8", False))
    both = [
        k.attend(*launch, scale=0.3, one_token_rows=where[2], **options) for k in (XlaKernels("gpu"), kernels)
    ]
    (expected, pool), (got, same_pool) = both
    real = np.array(where[0]) >= 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(expected)[real], atol=5e-5)
    assert np.isfinite(np.asarray(got)).all()
    for mine, reference in zip(jax.tree.leaves(same_pool), jax.tree.leaves(pool), strict=True):
        np.testing.assert_array_equal(mine, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_agrees_with_plain_xla(where: tuple, kind: str) -> None:
    *shape, options = KINDS[kind]
    _compared(PallasGpuKernels(interpret=INTERPRET), where, tuple(shape), 8, options)


@pytest.mark.parametrize("page_tokens", [12, 32, 128])
@pytest.mark.parametrize("where", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_any_page_size(where: tuple, page_tokens: int) -> None:
    _compared(PallasGpuKernels(interpret=INTERPRET), where, (2, 2, 16), page_tokens, {})


@pytest.mark.parametrize(
    "kind", ["plain", "odd heads and width", "window", "softcap", "slopes", "sinks", "in 8 bits"]
)
def test_blocks_of_keys_that_all_see(kind: str) -> None:
    kv_heads, _, head_dim, options = KINDS[kind]
    if "sinks" in options:
        options = {"sinks": np.linspace(-1, 4, 4 * kv_heads).reshape(kv_heads, 4)}
    if "slopes" in options:
        options = {"slopes": tuple(np.linspace(0.5, 0.05, 4 * kv_heads))}
    _compared(PallasGpuKernels(interpret=INTERPRET), LONG, (kv_heads, 4, head_dim), 32, options)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_lanes_that_decode_beside_prompts(kind: str) -> None:
    *shape, options = KINDS[kind]
    _compared(PallasGpuKernels(interpret=INTERPRET), MIXED, tuple(shape), 8, options)


@pytest.mark.parametrize(("data", "model"), [(1, 4)])
@pytest.mark.parametrize("where", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_each_device_attends_with_its_heads(where: tuple, data: int, model: int) -> None:
    placement: Placement = make_placement(data, model)
    _compared(PallasGpuKernels(placement, interpret=INTERPRET), where, (4, 2, 16), 8, {"int8": model == 4})


@pytest.mark.parametrize(
    "where",
    [
        ([70, 65, -1, 127], [0, 1, 2, 3], 4),
        ([*range(40, 60), *range(20)], [0] * 20 + [1] * 20, 0),
        ([*range(40, 60), *range(19)], [0] * 20 + [1] * 19, 0),
    ],
    ids=["decode", "prefill", "prefill that does not divide"],
)
def test_rows_split_over_the_data_axis(where: tuple) -> None:
    _compared(
        PallasGpuKernels(make_placement(2, 2), interpret=INTERPRET), where, (2, 2, 16), 8, {"window": 30}
    )


def test_few_rows_are_split_and_many_are_not() -> None:
    assert _splits(8, 64) == 32  # one row of eight kv heads: 256 programs, as many as one may have
    assert _splits(8, 1) == 1  # one block cannot be split
    assert _splits(64 * 8, 64) == 2
    assert _splits(256 * 8, 64) == 1
