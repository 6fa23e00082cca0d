"""Grouped matmul, each way in which it is computed, against NumPy in float64, and what goes to no group."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.rounding import in_bytes, rounded
from xlane.engine.kernels.native.calls import NativeKernels, native_kernels
from xlane.models.attention import XlaKernels
from xlane.models.config import Experts, ModelConfig
from xlane.models.experts import RoutedFeedForward, route
from xlane.models.grouped import in_turns, ragged
from xlane.models.modules import Style
from xlane.models.quantize import quantized
from xlane.models.spec import ParamSpec, Quant, Quantized, pack

INPUTS, OUTPUTS = 24, 20

Grouped = Callable[[jax.Array, np.ndarray | Quantized[np.ndarray], jax.Array], jax.Array]


@pytest.fixture(params=["in turns", "ragged", "native"])
def grouped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grouped:
    if request.param != "native":
        compute = jax.jit(in_turns if request.param == "in turns" else ragged)
        return lambda x, weight, sizes: compute(x, jax.tree.map(jnp.asarray, weight), sizes)
    native = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    if isinstance(native, str):
        pytest.skip(native)
    compute = jax.jit(native.grouped_linear, static_argnums=3)

    def panels(part: np.ndarray) -> jax.Array:
        return jnp.asarray(pack(part, stacked=True))

    return lambda x, weight, sizes: compute(x, jax.tree.map(panels, weight), sizes, OUTPUTS)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, [0, 1, 0, 0]),
        (5, [1, 1, 1, 1]),
        (8, [0, 0, 8, 0]),
        (40, [3, 0, 17, 12]),
        (300, [150, 1, 149, 0]),
        (6, [0, 0, 0, 0]),
    ],
    ids=str,
)
def test_every_group_meets_its_own_weight(grouped: Grouped, rows: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, INPUTS), dtype=np.float32)
    weight = rng.standard_normal((len(sizes), OUTPUTS, INPUTS), dtype=np.float32)
    got = np.asarray(grouped(jnp.asarray(x), weight, jnp.array(sizes, jnp.int32)))
    assert np.isfinite(got).all()
    start = 0
    for group, size in enumerate(sizes):
        want = x[start : start + size].astype(np.float64) @ weight[group].astype(np.float64).T
        np.testing.assert_allclose(got[start : start + size], want, rtol=0, atol=1e-5)
        start += size


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_every_group_meets_its_own_weight_in_few_bits(grouped: Grouped, quant: Quant) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 64), dtype=np.float32)
    weight = rng.standard_normal((4, OUTPUTS, 64), dtype=np.float32)
    got = np.asarray(grouped(jnp.asarray(x), quantized(weight, quant), jnp.array([3, 0, 17, 12], jnp.int32)))
    for group, rows in ((0, slice(0, 3)), (2, slice(3, 20)), (3, slice(20, 32))):
        np.testing.assert_allclose(got[rows], x[rows] @ rounded(weight[group], quant).T, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("kind", "group"), [("int8", 32), ("fp8", 0), ("fp8", 32)])
def test_every_group_meets_its_own_stored_bytes(grouped: Grouped, kind: str, group: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 64), dtype=np.float32)
    values, scales, full = in_bytes(rng, kind, group, 4, OUTPUTS, 64)
    got = np.asarray(grouped(jnp.asarray(x), Quantized(values, scales), jnp.array([3, 0, 17, 12], jnp.int32)))
    for number, rows in ((0, slice(0, 3)), (2, slice(3, 20)), (3, slice(20, 32))):
        np.testing.assert_allclose(got[rows], x[rows] @ full[number].T, rtol=0, atol=5e-5)


def test_a_row_is_the_same_bits_whatever_its_group_holds(tmp_path_factory: pytest.TempPathFactory) -> None:
    native = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    if isinstance(native, str):
        pytest.skip(native)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((30, INPUTS), dtype=np.float32))
    weight = jnp.asarray(pack(rng.standard_normal((3, OUTPUTS, INPUTS), dtype=np.float32), stacked=True))
    whole = native.grouped_linear(x, weight, jnp.array([10, 10, 10], jnp.int32), OUTPUTS)
    alone = native.grouped_linear(x[12:13], weight, jnp.array([0, 1, 0], jnp.int32), OUTPUTS)
    np.testing.assert_array_equal(alone[0], whole[12])


def test_the_native_one_refuses_what_does_not_fit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    native = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    if not isinstance(native, NativeKernels):
        pytest.skip(native)
    x, weight = jnp.zeros((2, 8)), jnp.zeros((3, 2, 8, 16))
    with pytest.raises(ValueError, match="do not give 40 outputs"):
        native.grouped_linear(x, weight, jnp.zeros(3, jnp.int32), 40)
    with pytest.raises(jax.errors.JaxRuntimeError, match="more rows in groups"):
        native.grouped_linear(x, weight, jnp.array([1, 1, 1], jnp.int32), 32)


def test_stacked_weights_are_packed_one_by_one() -> None:
    weight = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    stored = pack(weight, stacked=True)
    spec = ParamSpec("w", weight.shape, "float32", (None,) * 3, packed=True, stacked=True)
    assert stored.shape == spec.stored_shape == (2, 1, 3, 16)
    np.testing.assert_array_equal(stored[1], pack(weight[1]))


LOGITS = jnp.log(jnp.array([[1.0, 4.0, 2.0, 1.0]]))


@pytest.mark.parametrize(("normalized", "shares"), [(False, [0.5, 0.25]), (True, [2 / 3, 1 / 3])])
def test_shares_of_the_chosen(normalized: bool, shares: list[float]) -> None:
    chosen, got = route(LOGITS, Experts(count=4, chosen=2, ffn_size=8, normalized=normalized))
    assert chosen.tolist() == [[1, 2]]
    np.testing.assert_allclose(got[0], shares, rtol=1e-6)


def test_sparse_mixer_by_hand() -> None:
    """Logits 4, 3.6, 1, -2 and a jitter of 0.1: within 20 % of the best, 4 and 3.6 share; once 4 is gone, 3.6 stands alone."""
    experts = Experts(count=4, chosen=2, ffn_size=8, shares="sparsemixer", mixer_jitter=0.1)
    chosen, shares = route(jnp.array([[1.0, 4.0, -2.0, 3.6]]), experts)
    assert chosen.tolist() == [[1, 3]]
    np.testing.assert_allclose(shares[0], [1 / (1 + np.exp(-0.4)), 1.0], rtol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
def test_a_wide_router_tells_apart_what_bfloat16_does_not(wide: bool):
    """Two experts that are asked for by 1 and by 1 + 1/1024: the second, where anybody sees it; the first gives zeros."""
    size = 1024
    experts = Experts(count=2, chosen=1, ffn_size=8, wide_router=wide)
    config = ModelConfig(
        family="any", vocab_size=8, hidden_size=size, layers=1, heads=1, kv_heads=1, head_dim=size, ffn_size=8,
        max_positions=8, norm_eps=1e-5, rope_theta=None, experts=experts,
    )  # fmt: skip
    layer = RoutedFeedForward(config, experts, Style("bfloat16", packed=False))
    even = jnp.full((2, size), 1 / size)
    layer.router.weight.value = even.at[1, 0].mul(2).astype(layer.router.weight.value.dtype)
    for stack in (layer.gate_up, layer.down):
        stack.weight.value = jnp.ones_like(stack.weight.value).at[0].set(0)
    out = layer(jnp.ones((1, size), jnp.bfloat16), jnp.ones(1, bool), XlaKernels("cpu"))
    assert out.dtype == jnp.bfloat16
    assert bool((out != 0).all()) is wide
