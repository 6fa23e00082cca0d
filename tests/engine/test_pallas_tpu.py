"""The TPU's attention kernel, interpreted, against plain XLA: over page and block borders, head counts, windows and caps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlane.engine.kernels.pallas_tpu import BLOCK_TOKENS, PallasTpuKernels, fits
from xlane.models.attention import XlaKernels
from xlane.models.kernels import KvLayer, PagedBatch
from xlane.sharding.mesh import Placement, make_placement

PAGES, WIDTH, PAGE_TOKENS = 24, 10, 64
NOBODYS = PAGES - 1
"""A page full of NaN, that stands wherever a row holds nothing."""
POSITIONS = [BLOCK_TOKENS - 1, BLOCK_TOKENS, -1, 2 * BLOCK_TOKENS + 17, 0, PAGE_TOKENS - 1]
"""A block that is just full, one that is just begun, padding, several blocks, one key, a page that is just full."""

KINDS = {
    "plain": (2, 4, 128, {}),
    "one head a kv head": (4, 1, 128, {}),
    "all heads share": (1, 8, 128, {}),
    "wide": (1, 3, 256, {}),
    "window over a block's border": (2, 2, 128, {"window": BLOCK_TOKENS}),
    "all": (
        2,
        2,
        128,
        {
            "window": 300,
            "softcap": 3.0,
            "slopes": (0.4, 0.3, 0.2, 0.1),
            "sinks": np.linspace(-1, 4, 4).reshape(2, 2),
        },
    ),
}


def launch(kv_heads: int, group: int, head_dim: int, dtype: str = "float32"):
    """qkv, pool and batch as a step has them; what no row holds is NaN."""
    rng = np.random.default_rng(0)
    table, free = np.full((len(POSITIONS), WIDTH), NOBODYS), iter(rng.permutation(PAGES - 1))
    pools = rng.normal(size=(2, kv_heads, PAGES, PAGE_TOKENS, head_dim)).astype(np.float32)
    pools[:, :, NOBODYS] = np.nan
    for row, position in enumerate(POSITIONS):
        for index in range(position // PAGE_TOKENS + 1):
            table[row, index] = page = next(free)
            pools[:, :, page, max(0, position + 1 - index * PAGE_TOKENS) :] = np.nan
    qkv = rng.normal(size=(len(POSITIONS), kv_heads, group + 2, head_dim))
    rows = np.arange(len(POSITIONS))
    batch = PagedBatch(*(jnp.array(x, jnp.int32) for x in (POSITIONS, rows, table)))
    return jnp.array(qkv, dtype), KvLayer(*(jnp.array(pool, dtype) for pool in pools)), batch


def attend(kernels, qkv, kv, batch, *, sinks=None, window=None, **form):
    sinks = None if sinks is None else jnp.array(sinks, qkv.dtype)

    def run(qkv, kv, batch):
        return kernels.attend(
            qkv, kv, batch, window=window, scale=0.3, one_token_rows=len(qkv), sinks=sinks, **form
        )

    return jax.jit(run)(qkv, kv, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_what_plain_xla_makes_of_it(kind: str):
    kv_heads, group, head_dim, form = KINDS[kind]
    given = launch(kv_heads, group, head_dim)
    expected, expected_kv = attend(XlaKernels("cpu"), *given, **form)
    got, got_kv = attend(PallasTpuKernels(interpret=True), *given, **form)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    assert np.isfinite(got).all()
    assert (np.asarray(got)[POSITIONS.index(-1)] == 0).all()
    jax.tree.map(np.testing.assert_array_equal, got_kv, expected_kv)


def test_bfloat16_is_as_near_as_bfloat16_is():
    given = launch(2, 4, 128, "bfloat16")
    expected = attend(XlaKernels("cpu"), *given)[0].astype(jnp.float32)
    got = attend(PallasTpuKernels(interpret=True), *given)[0].astype(jnp.float32)
    np.testing.assert_allclose(got, expected, atol=0.03)


@pytest.mark.parametrize(("data", "model"), [(2, 2)])
def test_devices_attend_with_what_lies_there(data: int, model: int):
    given = launch(2, 2, 128)
    expected = attend(XlaKernels("cpu"), *given)[0]
    placement: Placement = make_placement(data, model)
    got = attend(PallasTpuKernels(placement, interpret=True), *given)[0]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("head_dim", "page_tokens", "rows", "can"),
    [
        (128, 32, 64, True),
        (256, 16, 64, True),
        (64, 32, 64, False),  # pages of such a pool lie innermost
        (128, 4, 64, False),
        (128, 48, 64, False),  # a block is no whole number of pages
        (128, 32, 1024, False),  # 1024 rows of 256 pages are 1 MiB of table
    ],
)
def test_what_the_kernel_cannot_do_is_plain_xlas(head_dim: int, page_tokens: int, rows: int, can: bool):
    assert fits(head_dim, page_tokens, (rows, 256)) == can


def test_a_small_head_is_attended_by_plain_xla():
    given = launch(2, 2, 64)
    expected = attend(XlaKernels("cpu"), *given)[0]
    np.testing.assert_allclose(
        attend(PallasTpuKernels(interpret=True), *given)[0], expected, rtol=2e-5, atol=2e-5
    )
