"""Grouped matmul in plain XLA: rows in blocks behind each other, each block times a weight of its own. Knows no experts."""

import math

import jax
import jax.numpy as jnp

from .kernels import Weight
from .quantize import operand

MOST_ROWS = 64
"""Of one turn of the loop on CPU."""


def ragged(x: jax.Array, weight: Weight, sizes: jax.Array) -> jax.Array:
    """x [S, D], weight [X, …, D], int32[X] rows of each group -> float32[S, …], by XLA's own operation."""
    weight, scales = operand(weight, x.dtype)
    contracted = (((1,), (weight.ndim - 1,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(
        contracted, lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    made = jax.lax.ragged_dot_general(x, weight, sizes, numbers, preferred_element_type=jnp.float32)
    if scales is None:
        return made
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0], dtype=jnp.int32), side="right")
    return made * scales.at[group].get(mode="clip")


def in_turns(x: jax.Array, weight: Weight, sizes: jax.Array) -> jax.Array:
    """The same on CPU, where XLA multiplies every row with every group's weight: a loop over blocks of rows of one group,
    which reads the weights of groups that have rows and no others.

    A block at the end of its group reaches into the next one; what it leaves there, the next block overwrites.
    """
    rows, groups = x.shape[0], sizes.shape[0]
    size = min(MOST_ROWS, 1 << max(0, math.ceil(math.log2(rows / groups))) if rows > groups else 1)
    flat = jax.tree.map(lambda stored: stored.reshape(groups, -1, stored.shape[-1]), weight)
    outputs = jax.tree.leaves(flat)[0].shape[1]
    blocks = (sizes + size - 1) // size
    block_ends, row_ends = jnp.cumsum(blocks), jnp.cumsum(sizes)
    padded = jnp.pad(x, ((0, size), (0, 0)))

    def turn(number: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(block_ends, number, side="right").astype(jnp.int32)
        block = number - (block_ends[group] - blocks[group])
        start = row_ends[group] - sizes[group] + block * size
        part = jax.lax.dynamic_slice_in_dim(padded, start, size)
        own = jax.tree.map(lambda stored: jax.lax.dynamic_index_in_dim(stored, group, keepdims=False), flat)
        mine, scales = operand(own, x.dtype)
        made = jax.lax.dot_general(part, mine, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if scales is not None:
            made = made * scales[None]
        return jax.lax.dynamic_update_slice_in_dim(out, made, start, 0)

    out = jnp.zeros((rows + size, outputs), jnp.float32)
    return jax.lax.fori_loop(0, block_ends[-1], turn, out)[:rows]
