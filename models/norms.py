"""Normalisation over the last axis, in float32, and the choice of one by the configuration. Knows nothing else."""

import jax
import jax.numpy as jnp
from flax import nnx

from .config import ModelConfig
from .kernels import Kernels
from .modules import Style, param


class RmsNorm(nnx.Module):
    """Over the root of the mean square; see `rowwise.rms_norm`."""

    def __init__(self, shape: tuple[int, ...], eps: float, plus_one: bool, style: Style) -> None:
        self.eps, self.plus_one = eps, plus_one
        self.scale = param(shape, _axes(shape), style.dtype)

    def __call__(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        scale = self.scale[...]
        if self.plus_one:
            # In float32: a scale's distance from 1 is stored because bfloat16 has few bits near 1.
            scale = 1.0 + scale.astype(jnp.float32)
        return kernels.rms_norm(x, _like(scale, x), self.eps)


class LayerNorm(nnx.Module):
    """Ba et al. 2016, with or without scale and bias."""

    def __init__(self, shape: tuple[int, ...], eps: float, scale: bool, bias: bool, style: Style) -> None:
        self.eps = eps
        self.scale = param(shape, _axes(shape), style.dtype) if scale else None
        self.bias = param(shape, _axes(shape), style.dtype) if bias else None

    def __call__(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        del kernels  # XLA fuses it well enough
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            normed = normed * _like(self.scale[...].astype(jnp.float32), x)
        if self.bias is not None:
            normed = normed + _like(self.bias[...].astype(jnp.float32), x)
        return normed.astype(x.dtype)


def norm(config: ModelConfig, style: Style, *shape: int) -> RmsNorm | LayerNorm:
    """The model's kind of norm, over the last axis of `shape`; more axes are heads, each with a scale of its own."""
    if config.norm == "rms":
        return RmsNorm(shape, config.norm_eps, config.norm_plus_one, style)
    return LayerNorm(shape, config.norm_eps, config.norm_scale, config.norm_bias, style)


def _axes(shape: tuple[int, ...]) -> tuple[str | None, ...]:
    return ("kv_heads", *(None,) * (len(shape) - 1)) if len(shape) > 1 else (None,)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """With as many axes as x."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)
