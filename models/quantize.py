"""Weights of 8 and of 4 bits, and keys and values of 8: how they are made, stored and used. Knows arrays; not whose they
are, nor files.

int8 has one float32 scale an output, the largest magnitude over 127: weight = value * scale. int4 has a bfloat16 scale and floor
for GROUP inputs of an output, weight = value * scale + floor, from the smallest of them to the largest: a checkpoint that was
stored so (llama.cpp's Q4_0, Q4_1 and Q4_K) loses next to nothing, and one of GPTQ or AWQ is kept as it is (`bit_tensors.py`). Two values share a byte, that of input i of a group and that of
input i + GROUP / 2, so that taking them apart is no shuffle. Checkpoints that have them are also kept as int8 with a float32 scale
for a group of inputs, and as FP8 (float8_e4m3fn) with one an output or a group: weight = value * scale.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from .spec import GROUP, Quant, Quantized

INT8_MOST, INT4_MOST = 127, 15


def quantized(weight: np.ndarray, kind: Quant) -> Quantized[np.ndarray]:
    """float32[..., D] -> the arrays of a weight of this kind, int8 or int4."""
    with np.errstate(invalid="ignore"):  # what is not a number stays none, by its scale
        return _to_int8(weight) if kind == "int8" else _to_int4(weight)


def _to_int8(weight: np.ndarray) -> Quantized[np.ndarray]:
    high, low = weight.max(axis=-1, keepdims=True), weight.min(axis=-1, keepdims=True)
    scales = np.maximum(high, -low) / np.float32(INT8_MOST)
    steps = weight / _divisor(scales)
    return Quantized(np.rint(steps, out=steps).astype(np.int8), scales)


def _to_int4(weight: np.ndarray) -> Quantized[np.ndarray]:
    *outputs, inputs = weight.shape
    # A group down a column: NumPy is many times faster along rows that are long.
    groups = np.ascontiguousarray(weight.reshape(-1, GROUP).T)
    low = groups.min(axis=0)
    scales = ((groups.max(axis=0) - low) / np.float32(INT4_MOST)).astype(ml_dtypes.bfloat16)
    floors = low.astype(ml_dtypes.bfloat16)
    # By scale and floor as they are stored, so that their rounding costs something at the ends only.
    steps = groups - floors.astype(np.float32)
    steps /= _divisor(scales.astype(np.float32))
    bits = np.clip(np.rint(steps, out=steps), 0, INT4_MOST, out=steps).astype(np.uint8)
    pairs = np.ascontiguousarray((bits[: GROUP // 2] | bits[GROUP // 2 :] << 4).T)
    by_group = (*outputs, inputs // GROUP)
    return Quantized(pairs.reshape(*outputs, inputs // 2), scales.reshape(by_group), floors.reshape(by_group))


def _divisor(scales: np.ndarray) -> np.ndarray:
    """The scales, and 1 where there is nothing to scale."""
    return np.where(scales == 0, np.float32(1), scales)


def vectors_to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., H] -> int8[..., H] and float32[...], a scale for each vector. Traced; what is not a number stays none."""
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(axis=-1) / INT8_MOST
    steps = jnp.rint(x / jnp.where(scales == 0, 1.0, scales)[..., None])
    return steps.astype(jnp.int8), scales


def dequantized(weight: Quantized[jax.Array], dtype: Any) -> jax.Array:
    """The weight [..., D] itself, in `dtype`. Traced: XLA fuses it into what reads it, where it can."""
    values, scales, floors = weight
    if floors is None:
        by_group = values.astype(jnp.float32).reshape(*scales.shape, -1) * scales[..., None]
        return by_group.reshape(values.shape).astype(dtype)
    pairs = values.reshape(*scales.shape, GROUP // 2)
    steps = jnp.concatenate([pairs & 15, pairs >> 4], axis=-1).astype(jnp.float32)
    groups = steps * scales.astype(jnp.float32)[..., None] + floors.astype(jnp.float32)[..., None]
    return groups.astype(dtype).reshape(*scales.shape[:-1], -1)


def operand(weight: jax.Array | Quantized[jax.Array], dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """What to multiply with, [..., D] in `dtype`, and what the products [...] are then to be multiplied with, if anything."""
    if not isinstance(weight, Quantized):
        return weight, None
    if weight.floors is None and weight.scales.shape[-1] == 1:
        return weight.values.astype(dtype), weight.scales[..., 0]
    return dequantized(weight, dtype), None
