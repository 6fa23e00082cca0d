"""The GPU's products with int8 weights, interpreted, against NumPy: sizes that no tile divides, and what is left to XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlane.engine.kernels.pallas_gpu import PallasGpuKernels
from xlane.engine.kernels.pallas_gpu_linear import MOST_ROWS, _splits, linear
from xlane.models.quantize import quantized
from xlane.models.spec import Quantized
from xlane.sharding.mesh import make_placement

INTERPRET = jax.default_backend() != "gpu"
"""On a GPU the kernel itself is tested: `JAX_PLATFORMS=cuda pytest tests/engine/test_pallas_gpu_linear.py`."""

CASES = {
    # rows, inputs, outputs
    "one row": (1, 256, 128),
    "nothing divides": (5, 300, 70),
    "rows fill the tile": (16, 512, 64),
    "fewer inputs than a tile": (2, 96, 64),
    "parts of the inputs": (3, 4096, 64),
    "parts that are not alike": (3, 3500, 33),
    "one part fewer than there could be": (3, 8960, 40),  # 35 turns: eight parts of five would be forty
}


def _stored(inputs: int, outputs: int, group: int = 0, kind: str = "int8") -> tuple[Quantized, np.ndarray]:
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
    rows, inputs, outputs = CASES[case]
    weight, meant = _stored(inputs, outputs)
    x = _rows(rows, inputs)
    expected = np.asarray(x).astype(np.float64) @ meant.T
    got = linear(x, weight, interpret=INTERPRET)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_few_outputs_are_split_over_the_inputs_and_many_are_not() -> None:
    assert _splits(64, 56) == 14  # 4096 outputs, 14336 inputs in turns of 256: four turns each at least
    assert _splits(64, 16) == 4
    assert _splits(448, 16) == 2
    assert _splits(2004, 16) == 1
    assert _splits(1, 3) == 1


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
    byte = _stored(64, 32)[0]
    assert _ours(kernels, byte, MOST_ROWS)
    assert not _ours(kernels, byte, MOST_ROWS + 1)
    assert not _ours(kernels, byte, 1, "float32")
    assert not _ours(kernels, jnp.asarray(weights, jnp.bfloat16), 1)
    assert not _ours(kernels, jax.tree.map(jnp.asarray, quantized(weights, "int4")), 1)
    assert not _ours(kernels, _stored(64, 32, group=32)[0], 1)
    assert not _ours(kernels, _stored(64, 32, kind="float8_e4m3fn")[0], 1)
    assert not _ours(PallasGpuKernels(make_placement(1, 2), interpret=True), byte, 1)
