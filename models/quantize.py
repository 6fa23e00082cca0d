"""Weights of 8 and of 4 bits, and keys and values of 8: how they are made, stored and used. Knows arrays; not whose they
are, nor files.

Both are symmetric, weight = value * scale. int8 has one float32 scale an output, the largest magnitude over 127. int4 has
one bfloat16 scale for GROUP inputs of an output, chosen so that the largest of them is -8 exactly: the one of 16 levels
that symmetry would waste is the one that is sure to be used (llama.cpp's Q4_0 does the same). Two values share a byte, that of
input i of a group and that of input i + GROUP / 2, so that taking them apart is no shuffle.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from .spec import GROUP, Quant, Quantized

INT8_MOST, INT4_LEAST, INT4_MOST = 127, -8, 7


def quantized(weight: np.ndarray, kind: Quant) -> Quantized[np.ndarray]:
    """float32[..., D] -> int8[..., D] and float32[..., 1], or uint8[..., D/2] and bfloat16[..., D/GROUP]."""
    with np.errstate(invalid="ignore"):  # what is not a number stays none, by its scale
        return _to_int8(weight) if kind == "int8" else _to_int4(weight)


def _to_int8(weight: np.ndarray) -> Quantized[np.ndarray]:
    scales = np.abs(_largest(weight, -1)) / np.float32(INT8_MOST)
    return Quantized(_steps(weight, scales).astype(np.int8), scales)


def _to_int4(weight: np.ndarray) -> Quantized[np.ndarray]:
    *outputs, inputs = weight.shape
    # A group down a column: NumPy is many times faster along rows that are long.
    groups = np.ascontiguousarray(weight.reshape(-1, GROUP).T)
    scales = (_largest(groups, 0) / np.float32(INT4_LEAST)).astype(ml_dtypes.bfloat16)
    # By the scale as it is stored, so that its rounding costs nothing but the last step of the largest value.
    steps = _steps(groups, scales.astype(np.float32))
    bits = np.clip(steps, INT4_LEAST, INT4_MOST, out=steps).astype(np.int8).view(np.uint8)
    pairs = (bits[: GROUP // 2] & 15) | (bits[GROUP // 2 :] << 4)
    return Quantized(
        np.ascontiguousarray(pairs.T).reshape(*outputs, inputs // 2), scales.reshape(*outputs, -1)
    )


def _largest(weight: np.ndarray, axis: int) -> np.ndarray:
    """By magnitude, with its sign, along an axis that is kept."""
    high, low = weight.max(axis=axis, keepdims=True), weight.min(axis=axis, keepdims=True)
    return np.where(high > -low, high, low)


def _steps(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """How many scales each number is, rounded; zeros of no scale stay."""
    steps = weight / np.where(scales == 0, np.float32(1), scales)
    return np.rint(steps, out=steps)


def vectors_to_int8(x: jax.Array) -> Quantized[jax.Array]:
    """[..., H] -> int8[..., H] and float32[...], a scale for each vector. Traced; what is not a number stays none."""
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(axis=-1) / INT8_MOST
    steps = jnp.rint(x / jnp.where(scales == 0, 1.0, scales)[..., None])
    return Quantized(steps.astype(jnp.int8), scales)


def dequantized(weight: Quantized[jax.Array], dtype: Any) -> jax.Array:
    """The weight [..., D] itself, in `dtype`. Traced: XLA fuses it into what reads it, where it can."""
    values, scales = weight
    if values.dtype == jnp.int8:
        return (values.astype(jnp.float32) * scales).astype(dtype)
    pairs = values.reshape(*scales.shape, GROUP // 2)
    halves = (pairs << 4, pairs & 0xF0)  # a half in the high bits has its sign where int8 has it
    steps = jnp.concatenate([jax.lax.bitcast_convert_type(half, jnp.int8) >> 4 for half in halves], axis=-1)
    groups = steps.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    return groups.astype(dtype).reshape(*scales.shape[:-1], -1)


def operand(weight: jax.Array | Quantized[jax.Array], dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """What to multiply with, [..., D] in `dtype`, and what the products [...] are then to be multiplied with, if anything."""
    if not isinstance(weight, Quantized):
        return weight, None
    if weight.values.dtype == jnp.int8:
        return weight.values.astype(dtype), weight.scales[..., 0]
    return dequantized(weight, dtype), None
