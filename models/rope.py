"""Rotary positions: frequencies from the configuration, and the rotation itself. Knows no attention.

Su et al. 2021 (RoFormer), in the half-split form that Hugging Face checkpoints use; Llama 3.1's rescaling as published
with its weights.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from .config import Llama3Rope, ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """float32[H/2]: radians per position of each pair of dimensions."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    if config.rope_scaling is not None:
        frequencies = _llama3(frequencies, config.rope_scaling)
    return (frequencies / config.rope_linear_factor).astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    """Slow waves are stretched by `factor`, fast ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    stretched = np.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return np.where((wavelengths <= low) & (wavelengths >= high), between, stretched)


def rotation(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions int32[T] -> (cos, sin) float32[T, 1, G+2, H] for heads laid out as in a fused qkv: each kv head's queries
    and its key turn, its value stands still. In float32: bfloat16 cannot tell far positions apart."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turns = (np.arange(config.heads // config.kv_heads + 2) <= config.heads // config.kv_heads)[
        None, None, :, None
    ]
    cos = jnp.concatenate([cos, cos], axis=-1)[:, None, None, :]
    sin = jnp.concatenate([-sin, sin], axis=-1)[:, None, None, :]
    return jnp.where(turns, cos, 1.0), jnp.where(turns, sin, 0.0)


def rotate(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the heads of a fused qkv [T, K, G+2, H] by their positions' angles, in float32, returned in its dtype.

    One expression over the whole array, so that it becomes one loop: three would run side by side on the threads that
    the matmul kernels wait for.
    """
    wide = qkv.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([second, first], axis=-1) * sin).astype(qkv.dtype)
