"""Rotary positions: frequencies from the configuration, and the rotation itself. Knows no attention.

Su et al. 2021 (RoFormer), in the half-split form that most Hugging Face checkpoints use or in the interleaved one;
rescalings as published with the weights that need them (`config.py` names the sources).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from .config import DynamicRope, Llama3Rope, LongRope, ModelConfig, YarnRope


def rotary_width(config: ModelConfig) -> int:
    """Dimensions of a head that rotate."""
    return config.rotary_dim or config.head_dim


def inverse_frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
    """float32[R/2]: radians per position of each pair of the R rotating dimensions; `local` in layers with a base of their
    own."""
    width, theta = rotary_width(config), config.rope_local_theta if local else config.rope_theta
    if theta is None:
        raise ValueError("this configuration has no rotary positions")
    if isinstance(config.rope_scaling, DynamicRope) and not local:
        theta *= _growth(config.rope_scaling, config.max_positions) ** (width / (width - 2))
    frequencies = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    if local:
        return frequencies.astype(np.float32)
    match config.rope_scaling:
        case Llama3Rope() as scaling:
            frequencies = _llama3(frequencies, scaling)
        case YarnRope() as scaling:
            frequencies = _yarn(frequencies, scaling, theta, width)
        case LongRope() as scaling:
            long = _is_long(scaling, config)
            frequencies = frequencies / np.array(scaling.long_factors if long else scaling.short_factors)
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


def _yarn(frequencies: np.ndarray, scaling: YarnRope, theta: float, width: int) -> np.ndarray:
    """Blended along a ramp over the pairs, from those that turn `beta_fast` times in the original context on."""

    def pair(turns: float) -> float:
        return width * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _growth(scaling: DynamicRope, context: int) -> float:
    """By how much the base grows when `context` tokens are to be told apart."""
    stretch = max(context, scaling.original_max_position) / scaling.original_max_position
    return scaling.factor * stretch - (scaling.factor - 1)


def _is_long(scaling: LongRope, config: ModelConfig) -> bool:
    return config.max_positions > scaling.original_max_position


def attention_factor(config: ModelConfig) -> float:
    """What rotated queries and keys are multiplied by."""
    match config.rope_scaling:
        case YarnRope() as scaling:
            return scaling.attention_factor
        case LongRope() as scaling:
            long = _is_long(scaling, config)
            return scaling.long_attention_factor if long else scaling.attention_factor
        case _:
            return 1.0


def rotation(config: ModelConfig, positions: jax.Array, local: bool = False) -> tuple[jax.Array, jax.Array]:
    """positions int32[T] -> (cos, sin) float32[T, 1, G+2, H] for heads laid out as in a fused qkv: each kv head's queries
    and its key turn, its value stands still. With `latent` float32[T, 1, R], of what turns alone. In float32: bfloat16
    cannot tell far positions apart."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config, local)[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if not local and (factor := attention_factor(config)) != 1.0:
        cos, sin = cos * factor, sin * factor
    if config.rope_interleaved:
        cos, sin = (
            jnp.stack(pair, axis=-1).reshape(len(positions), -1) for pair in ((cos, cos), (-sin, sin))
        )
    else:
        cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    if config.latent:
        return cos[:, None, :], sin[:, None, :]
    turns = (np.arange(config.heads // config.kv_heads + 2) <= config.heads // config.kv_heads)[
        None, None, :, None
    ]
    still = config.head_dim - rotary_width(config)
    if still:
        cos = jnp.pad(cos, ((0, 0), (0, still)), constant_values=1.0)
        sin = jnp.pad(sin, ((0, 0), (0, still)))
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    return jnp.where(turns, cos, 1.0), jnp.where(turns, sin, 0.0)


def rotate(qkv: jax.Array, turning: tuple[jax.Array, ...], config: ModelConfig) -> jax.Array:
    """Turn the heads of a fused qkv [T, K, G+2, H] by their positions' angles (`rotation`'s cos and sin), in float32, returned in
    its dtype. With `latent`, what turns of heads, [T, N, R].

    One expression over the whole array, so that it becomes one loop: three would run side by side on the threads that
    the matmul kernels wait for.
    """
    cos, sin = turning
    wide = qkv.astype(jnp.float32)
    return (wide * cos + _partners(wide, config) * sin).astype(qkv.dtype)


def _partners(x: jax.Array, config: ModelConfig) -> jax.Array:
    """x [..., H] with the two dimensions of each pair exchanged; those that stand still may be anything finite."""
    width = rotary_width(config)
    if config.rope_interleaved:
        pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
        return pairs[..., ::-1].reshape(x.shape)
    first, second, *still = jnp.split(x, [width // 2, width][: 1 + (width < x.shape[-1])], axis=-1)
    return jnp.concatenate([second, first, *still], axis=-1)
