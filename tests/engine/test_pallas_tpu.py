"""The TPU's attention kernels, interpreted, against plain XLA: over page and block borders, head counts, windows and caps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlane.engine.kernels import pallas_tpu
from xlane.engine.kernels.pallas_tpu import PallasTpuKernels
from xlane.engine.kernels.pallas_tpu_bodies import BLOCK_TOKENS
from xlane.engine.kernels.pallas_tpu_rows import WideRows
from xlane.models.attention import XlaKernels
from xlane.models.kernels import KvLayer, PagedBatch
from xlane.sharding.mesh import make_placement

pytestmark = pytest.mark.slow

PAGES, WIDTH, PAGE_TOKENS = 24, 10, 64
NOBODYS = PAGES - 1
"""A page full of NaN, that stands wherever a row holds nothing."""
LAST = [BLOCK_TOKENS - 1, BLOCK_TOKENS, -1, 2 * BLOCK_TOKENS + 17, 0, PAGE_TOKENS - 1]
"""A block that is just full, one that is just begun, padding, several blocks, one key, a page that is just full."""
DECODE = (LAST, [*range(6)], 6)
PREFILL = (
    [*range(BLOCK_TOKENS - 20, BLOCK_TOKENS + 1), *range(13), *range(60, 69), 0, *[-1] * 7],
    [0] * 21 + [1] * 13 + [3] * 9 + [4] * 8,
    0,
)
"""A piece behind what is cached and over a block's border, a whole prompt, a piece over a page's border, one token."""
MIXED = ([BLOCK_TOKENS + 6, -1, *range(40, 58), *range(9), -1], [0, 1, *[2] * 18, *[3] * 10], 2)
OVER_BORDERS = (
    [BLOCK_TOKENS + 6, -1, *range(BLOCK_TOKENS - 12, BLOCK_TOKENS + 6), *range(9), -1],
    MIXED[1],
    2,
)
"""The same, where a prompt's piece lies over the border of a block and of a page of any size."""
LAUNCHES = {"decode": DECODE, "prefill": PREFILL, "mixed": MIXED}

KINDS = {
    "plain": (2, 4, 128, {}),
    "one head a kv head": (4, 1, 128, {}),
    "all heads share": (1, 8, 128, {}),
    "wide": (1, 3, 256, {}),
    "window over a block's border": (2, 2, 128, {"window": BLOCK_TOKENS}),
    "window of few": (1, 2, 128, {"window": 10}),
    "two heads in a row": (2, 3, 64, {}),
    "a head alone in a row": (1, 2, 96, {}),
    "three heads in two rows": (
        3,
        2,
        64,
        {
            "window": 300,
            "slopes": (0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
            "sinks": np.linspace(-1, 4, 6).reshape(3, 2),
        },
    ),
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


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """So that few tokens have borders between blocks of queries."""
    monkeypatch.setattr(pallas_tpu, "QUERY_ROWS", 64)


def launch(
    where: tuple, kv_heads: int, group: int, head_dim: int, dtype: str = "float32", width: int = PAGE_TOKENS
):
    """qkv, pool and batch as a step has them; what no row holds is NaN."""
    positions, rows, _ = where
    rng = np.random.default_rng(0)
    table, free = np.full((max(rows) + 1, WIDTH), NOBODYS), iter(rng.permutation(PAGES - 1))
    pools = rng.normal(size=(2, kv_heads, PAGES, width, head_dim)).astype(np.float32)
    pools[:, :, NOBODYS] = np.nan
    for row in range(max(rows) + 1):
        last = max((p for p, r in zip(positions, rows, strict=True) if r == row), default=-1)
        for index in range(last // width + 1):
            table[row, index] = page = next(free)
            pools[:, :, page, max(0, last + 1 - index * width) :] = np.nan
    qkv = rng.normal(size=(len(positions), kv_heads, group + 2, head_dim))
    batch = PagedBatch(*(jnp.array(x, jnp.int32) for x in (positions, rows, table)))
    return jnp.array(qkv, dtype), KvLayer(*(jnp.array(pool, dtype) for pool in pools)), batch


def attend(kernels, where, given, *, sinks=None, window=None, **form):
    sinks = None if sinks is None else jnp.array(sinks, given[0].dtype)

    def run(qkv, kv, batch):
        return kernels.attend(
            qkv, kv, batch, window=window, scale=0.3, one_token_rows=where[2], sinks=sinks, **form
        )

    return jax.jit(run)(*given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_attention_is_what_plain_xla_makes_of_it(name: str, kind: str):
    *shape, form = KINDS[kind]
    compare(PallasTpuKernels(interpret=True), LAUNCHES[name], shape, form)


def in_rows(pool: jax.Array, kernels, split: int = 1) -> jax.Array:
    """A pool [K, P, W, H] as the kernels have it: heads side by side, zeros where none is."""
    kv_heads, *_, head_dim = pool.shape
    rows, width = kernels.kv_rows(kv_heads, head_dim)
    here, rows_here = kv_heads // split, rows // split
    shared = -(-here // rows_here)
    wide = np.where(
        np.isnan(pool[:1, ..., :1]), np.nan, np.zeros((rows, *pool.shape[1:3], width), pool.dtype)
    )
    for head in range(kv_heads):
        row = head // here * rows_here + head % here // shared
        begin = head % here % shared * head_dim
        wide[row, ..., begin : begin + head_dim] = pool[head]
    return jnp.asarray(wide, pool.dtype)


def compare(kernels, where, shape, form, split=1, width=PAGE_TOKENS):
    qkv, kv, batch = given = launch(where, *shape, width=width)
    expected, expected_kv = attend(XlaKernels("cpu"), where, given, **form)
    given = qkv, KvLayer(in_rows(kv.k, kernels, split), in_rows(kv.v, kernels, split)), batch
    got, got_kv = attend(kernels, where, given, **form)
    real = np.array(where[0]) >= 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(expected)[real], rtol=2e-5, atol=2e-5)
    assert np.isfinite(got).all()
    assert "sinks" in form or (np.asarray(got)[~real] == 0).all()
    for mine, reference in ((got_kv.k, expected_kv.k), (got_kv.v, expected_kv.v)):
        np.testing.assert_array_equal(mine, in_rows(reference, kernels, split))


def test_lanes_that_decode_beside_prompts():
    *shape, form = KINDS["all"]
    compare(PallasTpuKernels(interpret=True), MIXED, shape, form)


@pytest.mark.parametrize("width", [16, 2 * BLOCK_TOKENS])
def test_blocks_of_many_pages_and_pages_of_many_blocks(width: int):
    where = LAST if width > 16 else [150, 96, -1]  # a table of ten pages
    compare(
        PallasTpuKernels(interpret=True),
        (where, [*range(len(where))], len(where)),
        (2, 2, 128),
        {},
        width=width,
    )


def test_bfloat16_is_as_near_as_bfloat16_is():
    given = launch(MIXED, 2, 4, 128, "bfloat16")
    expected = attend(XlaKernels("cpu"), MIXED, given)[0].astype(jnp.float32)
    got = attend(PallasTpuKernels(interpret=True), MIXED, given)[0].astype(jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=0.01, atol=0.03)


def in_steps(pool: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A pool in int8 and its scales; what no row holds has no number for a scale."""
    scales = np.abs(pool).max(axis=-1) / 127
    steps = np.nan_to_num(np.round(np.asarray(pool) / np.where(scales == 0, 1, scales)[..., None]), nan=99)
    return jnp.array(steps, jnp.int8), jnp.array(scales, jnp.float32)


def compare_in_int8(kernels, shape, form, width: int, monkeypatch: pytest.MonkeyPatch, split: int = 1):
    qkv, kv, batch = launch(OVER_BORDERS, *shape, width=width)
    (k, k_scales), (v, v_scales) = (in_steps(in_rows(pool, kernels, split)) for pool in (kv.k, kv.v))
    given = qkv, KvLayer(k, v, k_scales, v_scales), batch
    got, got_kv = attend(kernels, OVER_BORDERS, given, **form)
    monkeypatch.setattr(pallas_tpu, "MOST_TABLE_BYTES", 0)  # so it is plain XLA's
    expected, expected_kv = attend(kernels, OVER_BORDERS, given, **form)
    real = np.array(OVER_BORDERS[0]) >= 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(expected)[real], rtol=2e-5, atol=2e-5)
    assert np.isfinite(got).all()
    assert np.abs(np.asarray(got)[real]).max() > 0.1
    for mine, reference in zip(got_kv, expected_kv, strict=True):
        np.testing.assert_array_equal(mine, reference)


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("plain", 128),
        ("all heads share", 256),
        ("wide", 128),
        ("window over a block's border", 512),
        ("three heads in two rows", 128),
        ("all", 256),
    ],
)
def test_keys_and_values_in_int8(kind: str, width: int, monkeypatch: pytest.MonkeyPatch):
    *shape, form = KINDS[kind]
    compare_in_int8(PallasTpuKernels(interpret=True), shape, form, width, monkeypatch)


def test_devices_attend_in_int8_with_what_lies_there(monkeypatch: pytest.MonkeyPatch):
    kernels = PallasTpuKernels(make_placement(2, 2), interpret=True)
    compare_in_int8(kernels, (2, 2, 128), {}, 128, monkeypatch, split=2)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 128), (6, 64)])
def test_devices_attend_with_what_lies_there(kv_heads: int, head_dim: int):
    kernels = PallasTpuKernels(make_placement(2, 2), interpret=True)
    compare(kernels, MIXED, (kv_heads, 2, head_dim), {}, split=2)


def test_prompts_need_not_divide_over_the_data_axis():
    where = ([*range(40, 60), *range(19)], [0] * 20 + [1] * 19, 0)
    compare(PallasTpuKernels(make_placement(2, 2), interpret=True), where, (2, 2, 128), {}, split=2)


@pytest.mark.parametrize(
    ("heads", "split", "rows"),
    [
        ((8, 128), 8, (8, 128)),  # as it is
        ((8, 64), 1, (4, 128)),  # Llama 3.2 1B
        ((8, 64), 4, (4, 128)),
        ((8, 64), 8, (8, 128)),  # a device's one head has a row to itself
        ((3, 64), 1, (2, 128)),  # SmolLM2 135M
        ((32, 96), 1, (32, 128)),  # Phi 3 mini
        ((4, 32), 1, (1, 128)),
        ((1, 192), 1, (1, 256)),
    ],
)
def test_rows_of_the_pool_are_whole_tiles(heads: tuple[int, int], split: int, rows: tuple[int, int]):
    assert (WideRows(*heads, split).count, WideRows(*heads, split).width) == rows


@pytest.mark.parametrize(
    ("page_tokens", "rows", "kv_dtype", "why"),
    [
        (32, 64, "bfloat16", ""),
        (16, 64, "float32", ""),
        (128, 64, "int8", ""),
        (64, 64, "int8", "pages of 64 tokens in int8, not of a multiple of 128"),
        (4, 64, "bfloat16", "pages of 4 tokens"),
        (512, 64, "bfloat16", ""),
        (48, 64, "bfloat16", "pages of 48 tokens"),  # a block is no whole number of them
        (384, 64, "bfloat16", "pages of 384 tokens"),  # which is no whole number of blocks
        (32, 1024, "bfloat16", "1024 rows is too large for contexts beyond 4096 tokens"),  # 1 MiB of table
    ],
)
def test_what_the_kernels_cannot_do_is_plain_xlas(page_tokens: int, rows: int, kv_dtype: str, why: str):
    told = PallasTpuKernels().refusal(page_tokens, (rows, 256), kv_dtype)
    assert why in told
    assert bool(why) == bool(told)


def test_plain_xla_attends_in_wide_rows_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pallas_tpu, "MOST_TABLE_BYTES", 0)
    *shape, form = KINDS["three heads in two rows"]
    compare(PallasTpuKernels(interpret=True), MIXED, shape, form)
