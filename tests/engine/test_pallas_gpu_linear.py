"""The GPU's products with weights of 8 bits, interpreted, against NumPy: sizes that no tile divides, scales of outputs and of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlane.engine.kernels.pallas_gpu import PallasGpuKernels
from xlane.engine.kernels.pallas_gpu_linear import MOST_ROWS, Tile, _splits, linear, tile_of
from xlane.models.quantize import quantized
from xlane.models.spec import Quantized
from xlane.sharding.mesh import make_placement

INTERPRET = jax.default_backend() != "gpu"
"""On a GPU the kernel itself is tested: `JAX_PLATFORMS=cuda pytest tests/engine/test_pallas_gpu_linear.py`."""

CASES = {
    # rows, inputs, outputs, inputs that share a scale, type
    "one row": (1, 256, 128, 0, "int8"),
    "nothing divides": (5, 300, 70, 0, "int8"),
    "rows fill tiles": (16, 128, 64, 0, "int8"),
    "parts of the inputs": (3, 2048, 64, 0, "int8"),
    "parts that are not alike": (3, 1700, 33, 0, "int8"),
    "more rows than a tile": (65, 256, 40, 0, "int8"),
    "groups": (17, 512, 70, 128, "int8"),
    "groups smaller than a tile": (4, 320, 70, 32, "int8"),
    "groups larger than a tile": (4, 1024, 33, 512, "int8"),
    "FP8": (2, 300, 70, 0, "float8_e4m3fn"),
    "FP8 in groups, in parts": (9, 4096, 40, 128, "float8_e4m3fn"),
}


def _stored(inputs: int, outputs: int, group: int, kind: str) -> tuple[Quantized, np.ndarray]:
    """A weight, and what it stands for: float64[N, D]."""
    rng = np.random.default_rng(0)
    values = np.asarray(jnp.asarray(rng.integers(-127, 128, (outputs, inputs)), jnp.float32).astype(kind))
    scales = rng.uniform(0.001, 0.1, (outputs, inputs // group if group else 1)).astype(np.float32)
    each = np.repeat(scales.astype(np.float64), inputs // scales.shape[1], axis=1)
    return Quantized(jnp.asarray(values), jnp.asarray(scales)), values.astype(np.float64) * each


def _rows(count: int, inputs: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, inputs)), jnp.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_numpy(case: str) -> None:
    rows, inputs, outputs, group, kind = CASES[case]
    weight, meant = _stored(inputs, outputs, group, kind)
    x = _rows(rows, inputs)
    expected = np.asarray(x).astype(np.float64) @ meant.T
    got = linear(x, weight, tile_of(rows), interpret=INTERPRET)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max() * np.sqrt(inputs))


def test_any_tile_gives_the_same() -> None:
    weight, meant = _stored(600, 150, 0, "int8")
    x = _rows(20, 600)
    expected = np.asarray(x).astype(np.float64) @ meant.T
    for tile in (Tile(16, 16, 32, programs=1), Tile(32, 128, 256), Tile(64, 32, 64, programs=10**4)):
        got = linear(x, weight, tile, interpret=INTERPRET)
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_few_outputs_are_split_over_the_inputs_and_many_are_not() -> None:
    assert _splits(64, 112, 528) == 16  # 14336 inputs in turns of 128, 4096 outputs in tiles of 64
    assert _splits(64, 32, 528) == 8  # four turns each at least
    assert _splits(2004, 32, 528) == 1
    assert _splits(1, 3, 528) == 1


def test_outputs_of_several_axes_come_in_the_type_of_the_rows() -> None:
    weight = quantized(np.random.default_rng(2).normal(size=(3, 7, 64)).astype(np.float32), "int8")
    meant = (weight.values * weight.scales).reshape(21, 64)
    x = _rows(4, 64)
    got = PallasGpuKernels(interpret=INTERPRET).linear(x, jax.tree.map(jnp.asarray, weight), 21)
    assert (got.shape, got.dtype) == ((4, 21), jnp.bfloat16)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(x, np.float32) @ meant.T, rtol=2**-7, atol=1e-2
    )


def _ours(
    kernels: PallasGpuKernels, weight: jax.Array | Quantized, rows: int, dtype: str = "bfloat16"
) -> bool:
    """Whether the kernel of this file multiplies."""
    inputs = 64
    traced = jax.make_jaxpr(lambda x, w: kernels.linear(x, w, 32))(jnp.ones((rows, inputs), dtype), weight)
    return "pallas_call" in str(traced)


def test_what_is_left_to_xla() -> None:
    kernels = PallasGpuKernels(interpret=True)
    weights = np.ones((32, 64), np.float32)
    byte, fp8 = _stored(64, 32, 0, "int8")[0], _stored(64, 32, 32, "float8_e4m3fn")[0]
    assert _ours(kernels, byte, MOST_ROWS)
    assert not _ours(kernels, byte, MOST_ROWS + 1)
    assert not _ours(kernels, byte, 1, "float32")
    assert not _ours(kernels, jnp.asarray(weights, jnp.bfloat16), 1)
    assert not _ours(kernels, jax.tree.map(jnp.asarray, quantized(weights, "int4")), 1)
    assert not _ours(PallasGpuKernels(make_placement(1, 2), interpret=True), byte, 1)
    assert _ours(kernels, fp8, 1)
    assert not _ours(PallasGpuKernels(fp8=False, interpret=True), fp8, 1)
    assert not _ours(kernels, _stored(64, 32, 8, "int8")[0], 1)  # groups narrower than a matrix unit takes
