"""Keys and values of 8 bits: what is written is the nearest step of a scale for each vector, and what is attended is that."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.test_native_kernels import DECODE, PREFILL, Case, fused, laid, make_case, reference
from xlane.engine.kernels.native.calls import native_kernels
from xlane.engine.state import Shapes, abstract_kv, held_bytes, page_bytes
from xlane.models.attention import XlaKernels
from xlane.models.config import Latent, ModelConfig
from xlane.models.kernels import Kernels, KvLayer, PagedBatch
from xlane.sharding.mesh import make_placement


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _attend(kernels, window, one_token_rows, qkv, kv, batch, sinks):
    scale = qkv.shape[-1] ** -0.5
    return kernels.attend(
        qkv, kv, batch, window=window, scale=scale, one_token_rows=one_token_rows, sinks=sinks
    )


def pools(kernels: Kernels, case: Case) -> KvLayer:
    """The case's pages in 8 bits, as these kernels lay them; pages nobody holds have no number for a scale."""

    def of(pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scales = np.abs(pool).max(axis=-1) / np.float32(127)
        steps = np.round(np.nan_to_num(pool / np.where(scales == 0, 1, scales)[..., None], nan=99))
        return steps.astype(np.int8), scales

    (k, k_scales), (v, v_scales) = of(case.k_pool), of(case.v_pool)
    return KvLayer(*map(jnp.array, (laid(kernels, k), v, k_scales, v_scales)))


def numbers(kernels: Kernels, kv: KvLayer) -> tuple[np.ndarray, np.ndarray]:
    """What the pools stand for."""
    keys = laid(kernels, np.asarray(kv.k), back=True)
    return tuple(
        np.asarray(steps, np.float32) * np.asarray(scales)[..., None]
        for steps, scales in ((keys, kv.k_scales), (kv.v, kv.v_scales))
    )


def check(kernels: Kernels, case: Case, window: int | None = None, sinks: np.ndarray | None = None) -> None:
    before = numbers(kernels, pools(kernels, case))
    batch = PagedBatch(jnp.asarray(case.positions), jnp.asarray(case.rows), jnp.asarray(case.table))
    one_token_rows = len(case.rows) if len(set(case.rows)) == len(case.rows) else 0
    qkv = fused(*(jnp.asarray(x) for x in (case.q, case.k, case.v)))
    out, kv = _attend(kernels, window, one_token_rows, qkv, pools(kernels, case), batch, sinks)
    after = numbers(kernels, kv)
    live = np.flatnonzero(case.positions >= 0)
    page = case.k_pool.shape[2]
    at = case.table[case.rows[live], case.positions[live] // page], case.positions[live] % page
    for given, old, new, scales in zip((case.k, case.v), before, after, (kv.k_scales, kv.v_scales)):
        written = new[:, at[0], at[1]].swapaxes(0, 1)
        steps = np.asarray(scales)[:, at[0], at[1]].swapaxes(0, 1)
        np.testing.assert_allclose(steps, np.abs(given[live]).max(axis=-1) / 127, rtol=1e-6)
        assert (np.abs(written - given[live]) <= 0.5001 * steps[..., None]).all()
        untouched = np.ones(new.shape[1:3], bool)
        untouched[at] = False
        np.testing.assert_array_equal(new[:, untouched], old[:, untouched])
    k, v = (np.zeros_like(x) for x in (case.k, case.v))
    k[live], v[live] = (new[:, at[0], at[1]].swapaxes(0, 1) for new in after)
    expected, _, _ = reference(
        replace(case, k=k, v=v, k_pool=before[0], v_pool=before[1]), window, sinks=sinks
    )
    np.testing.assert_allclose(np.asarray(out)[live], expected[live], rtol=0, atol=5e-6)


@pytest.mark.parametrize("runs", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize(("head", "page"), [(64, 16), (64, 5), (20, 32), (1, 8), (128, 64)])
def test_head_and_page_sizes(kernels: Kernels, runs: list[tuple[int, int]], head: int, page: int) -> None:
    check(kernels, make_case(runs, kv_heads=2, group=3, head=head, page=page))


@pytest.mark.parametrize("runs", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_windows_and_sinks(kernels: Kernels, runs: list[tuple[int, int]]) -> None:
    sinks = np.array([[0.5, -9], [1, 0]], np.float32)
    check(kernels, make_case(runs, kv_heads=2, group=2, head=32), window=20, sinks=sinks)


def test_a_key_of_zeros_has_no_scale_and_stays(kernels: Kernels) -> None:
    case = make_case([(3, 1), (0, 2)], kv_heads=2, group=1, head=16)
    check(kernels, replace(case, k=np.zeros_like(case.k), v=case.v * 1e-30))


def test_what_is_not_a_number_stays_none(kernels: Kernels) -> None:
    """The sampler finds broken rows by it."""
    case = make_case([(3, 1)], kv_heads=1, group=1, head=16)
    case.v[0, 0, 5] = np.nan
    batch = PagedBatch(jnp.asarray(case.positions), jnp.asarray(case.rows), jnp.asarray(case.table))
    qkv = fused(*(jnp.asarray(x) for x in (case.q, case.k, case.v)))
    out, _ = _attend(kernels, None, True, qkv, pools(kernels, case), batch, None)
    assert np.isnan(out).all()


def test_a_row_is_the_same_bits_however_its_prompt_was_cut(tmp_path_factory: pytest.TempPathFactory) -> None:
    native = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    if isinstance(native, str):
        pytest.skip(native)
    case = make_case([(0, 90)], kv_heads=2, group=2, head=32)

    def run(kv: KvLayer, tokens: slice) -> tuple[np.ndarray, KvLayer]:
        part = case.take(np.arange(90)[tokens])
        batch = PagedBatch(jnp.asarray(part.positions), jnp.asarray(part.rows), jnp.asarray(part.table))
        qkv = fused(*(jnp.asarray(x) for x in (part.q, part.k, part.v)))
        out, kv = _attend(native, None, False, qkv, kv, batch, None)
        return np.asarray(out), kv

    whole, _ = run(pools(native, case), slice(0, 90))
    first, kv = run(pools(native, case), slice(0, 37))
    second, _ = run(kv, slice(37, 90))
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)


def test_the_pools_are_updated_in_place(tmp_path_factory: pytest.TempPathFactory) -> None:
    for kernels in (XlaKernels("cpu"), native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")):
        if isinstance(kernels, str):
            pytest.skip(kernels)
        case = make_case([(40, 1), (3, 1)])
        kv = pools(kernels, case)
        batch = PagedBatch(jnp.asarray(case.positions), jnp.asarray(case.rows), jnp.asarray(case.table))
        qkv = fused(*(jnp.asarray(x) for x in (case.q, case.k, case.v)))
        lowered = _attend.lower(kernels, None, True, qkv, kv, batch, None)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes == sum(pool.nbytes for pool in jax.tree.leaves(kv))


def test_bytes_of_a_page() -> None:
    """By hand: 2 layers of 4 heads, keys and values, 8 tokens of 16 numbers and a scale."""
    config = ModelConfig(
        family="llama", vocab_size=8, hidden_size=64, layers=2, heads=4, kv_heads=4, head_dim=16, ffn_size=8,
        max_positions=16, norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    assert page_bytes(config, 8, "int8") == 2 * 2 * 4 * 8 * (16 + 4)
    for devices in (1, 2):
        kv = abstract_kv(config, Shapes(1, 3, 8, 1, 8), "int8", make_placement(1, devices))
        assert held_bytes(kv) == 3 * page_bytes(config, 8, "int8"), "no device holds another's heads"
    latent = replace(config, kv_heads=1, head_dim=20, latent=Latent(rank=16, rotary=4, still=8, value=8))
    assert page_bytes(latent, 8, "int8") == 2 * 8 * (20 + 4), "one vector a token, whatever the heads"
    kv = abstract_kv(latent, Shapes(1, 3, 8, 1, 8), "int8", make_placement(1, 2))
    assert held_bytes(kv) == 2 * 3 * page_bytes(latent, 8, "int8"), "each device reads it for its own heads"
