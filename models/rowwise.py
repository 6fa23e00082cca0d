"""What is computed of each row for itself: norm, gate, the likeliest of many. In plain XLA.

The reference for whoever computes it otherwise (`kernels.Kernels`). Knows arrays, not what a layer does with them.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from .config import Activation

ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_sigmoid": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x [..., D] over the root of its mean square, times `scale` [..., D] in the scale's dtype -> as x. Zhang and Sennrich
    2019."""
    wide = x.astype(jnp.float32)
    # As a dot: a plain reduction becomes a tree of them on CPU, four loops for each norm of a step instead of two.
    squares = jnp.einsum("...d,...d->...", wide, wide, precision=jax.lax.Precision.HIGHEST)[..., None]
    normed = wide * jax.lax.rsqrt(squares / x.shape[-1] + eps)
    return (normed.astype(scale.dtype) * scale).astype(x.dtype)


def gated(both: jax.Array, activation: Activation) -> jax.Array:
    """A gate and what it leaves through, [T, 2, F] -> [T, F]."""
    return ACTIVATIONS[activation](both[:, 0]) * both[:, 1]


def argmax(x: jax.Array) -> jax.Array:
    """float32[R, V] -> int32[R], the first of equals; V for a row whose maximum is NaN, which equals nothing.
    (XLA:CPU's maximum may leave out a NaN among numbers.)

    Two plain reductions: XLA:CPU does not vectorise a paired one.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(x == x.max(axis=-1, keepdims=True), ids, x.shape[1]).min(axis=-1)


class PlainRows:
    """All of it as methods, for kernels that leave it to XLA."""

    __slots__ = ()

    rms_norm = staticmethod(rms_norm)
    gated = staticmethod(gated)
    argmax = staticmethod(argmax)
