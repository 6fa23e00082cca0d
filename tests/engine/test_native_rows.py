"""What the native kernels compute of each row for itself, against NumPy in float64: norms, gates, the likeliest token."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlane.engine.kernels.native.calls import SIGMOIDS, NativeKernels
from xlane.models import rowwise

SHAPES = [(1, 1), (1, 5), (3, 64), (7, 100), (32, 576), (160, 577)]
"""Rows and columns: with and without a rest behind whole vectors, for one thread and for several."""


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_rms_norm_matches_numpy(kernels: NativeKernels, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    scale = rng.standard_normal(columns, dtype=np.float32)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * scale
    got = kernels.rms_norm(jnp.asarray(x), jnp.asarray(scale)[None], 1e-5)
    # The sum, its root and three products each round.
    np.testing.assert_allclose(got, want, rtol=16 * 2.0**-24)


def activated(activation: str, g: np.ndarray) -> np.ndarray:
    """As the papers write them: Elfwing et al. 2017 (silu), Hendrycks and Gimpel 2016 (gelu, both approximations)."""
    match activation:
        case "silu":
            return g / (1 + np.exp(-g))
        case "gelu_sigmoid":
            return g / (1 + np.exp(-1.702 * g))
        case _:
            return 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("activation", SIGMOIDS)
def test_gated_matches_numpy(kernels: NativeKernels, activation: str, rows: int, columns: int) -> None:
    rng = np.random.default_rng(columns)
    both = 4 * rng.standard_normal((rows, 2, columns), dtype=np.float32)
    wide = both.astype(np.float64)
    want = activated(activation, wide[:, 0]) * wide[:, 1]
    got = kernels.gated(jnp.asarray(both), activation)
    # 1 + tanh loses digits far below 0 in NumPy, too, and what it multiplies is as small as that.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7 if activation == "gelu_tanh" else 1e-30)


def test_gates_far_from_zero_are_open_or_shut(kernels: NativeKernels) -> None:
    both = jnp.array([[[-np.inf, -1e30, -100, 0, 100, 1e30, np.nan], [1] * 7]], jnp.float32)
    for activation in SIGMOIDS:
        got = kernels.gated(both, activation)[0].tolist()
        assert got[1:6] == [0, 0, 0, 100, pytest.approx(1e30)], activation
        assert math.isnan(got[6])


def test_other_activations_and_heads_are_left_to_xla(kernels: NativeKernels) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 8), dtype=np.float32))
    np.testing.assert_array_equal(kernels.gated(x, "relu2"), rowwise.gated(x, "relu2"))
    np.testing.assert_array_equal(kernels.rms_norm(x, x[:1], 1e-6), rowwise.rms_norm(x, x[:1], 1e-6))


@pytest.mark.parametrize("of", ["rms_norm", "gated"])
def test_a_row_is_the_same_bits_in_any_batch(kernels: NativeKernels, of: str) -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((200, 2, 577), dtype=np.float32))
    compute: dict[str, Callable[[jax.Array], jax.Array]] = {
        "rms_norm": lambda x: kernels.rms_norm(x[:, 0], x[0, 1:2] * 0 + 2, 1e-6),
        "gated": lambda x: kernels.gated(x, "silu"),
    }
    whole = np.asarray(compute[of](x))
    for rows in (1, 2, 31, 150):
        np.testing.assert_array_equal(compute[of](x[50 : 50 + rows]), whole[50 : 50 + rows])


@pytest.mark.parametrize("vocab", [1, 5, 16, 33, 1000, 49152])
def test_argmax_is_numpys(kernels: NativeKernels, vocab: int) -> None:
    """Which takes the first of equals."""
    rng = np.random.default_rng(vocab)
    x = rng.integers(-3, 4, (40, vocab)).astype(np.float32)
    x[1], x[2, -1], x[3, 0] = -np.inf, np.inf, np.inf
    np.testing.assert_array_equal(kernels.argmax(jnp.asarray(x)), x.argmax(axis=1))


@pytest.mark.parametrize("at", [0, 15, 16, 32])
def test_argmax_of_a_row_with_a_nan_is_no_token(kernels: NativeKernels, at: int) -> None:
    x = np.zeros((3, 33), np.float32)
    x[1, at] = np.nan
    assert kernels.argmax(jnp.asarray(x)).tolist() == [0, 33, 0]


def test_what_does_not_fit_is_refused(kernels: NativeKernels) -> None:
    with pytest.raises(Exception, match="a scale for each column"):
        jax.block_until_ready(kernels.rms_norm(jnp.ones((2, 8)), jnp.ones((1, 7)), 1e-6))
    with pytest.raises(TypeError, match="rms_norm: the native kernels compute in float32, x is bfloat16"):
        kernels.rms_norm(jnp.ones((2, 8), jnp.bfloat16), jnp.ones((1, 8)), 1e-6)
