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
    """positions int32[T] -> (cos, sin) float32[T, 1, H/2]. In float32: bfloat16 cannot tell far positions apart."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)[None, :]
    return jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each head of x [T, heads, H] by its position's angles, in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
