"""What one program of the GPU's attention kernels computes, traced by Pallas: blocks of keys against queries in registers.

A row's pages are walked block by block with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). The compiler
wants powers of two, so blocks are filled up and what lies outside is neither read nor written. Knows references and
program numbers; how many programs there are, and over which arrays, is `pallas_gpu.py`'s. Scores are kept in base 2, whose
power is one instruction.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ...models.attention import MASKED

LOG2_E = math.log2(math.e)

LEAST_ROWS = 16
"""Rows that a matrix unit multiplies at least."""

PROGRAMS = 528
"""That keep a device busy: 4 for each of 132 multiprocessors. What one program could do alone is split until there are as many."""

Carry = tuple[jax.Array, jax.Array, jax.Array]
"""Of M queries: the largest score, in base 2, and the sum of weights, float32[M], and the sum of weighted values, float32[M, H]."""

Axis = tuple[jax.Array, int | None]
"""Indices along an axis of an array, int32[N], and its size; None: all are inside."""


class Form(NamedTuple):
    """What is known while tracing."""

    scale: float
    softcap: float | None
    window: int | None
    page_tokens: int
    table_width: int
    group: int
    """Query heads of a kv head."""
    head_dim: int
    keys: int
    """Looked at per turn."""

    @property
    def width(self) -> int:
        """Of a head, filled up: the compiler wants powers of two."""
        return pl.next_power_of_2(self.head_dim)


def decode_kernel(qkv_ref, k_ref, v_ref, position_ref, table_ref, *refs, form: Form, splits: int, given):
    """One row, kv head and part of the keys: its carry. qkv [G+2, H], pools [P W, H], table [R Pmax]."""
    member = jnp.arange(max(LEAST_ROWS, pl.next_power_of_2(form.group)), dtype=jnp.int32)
    slopes, sinks, k_scales, v_scales, (maximum_ref, total_ref, acc_ref) = _given(
        refs, given, (member, form.group)
    )
    row, split = pl.program_id(0), pl.program_id(2)
    position = position_ref[row]
    low = 0 if form.window is None else jnp.maximum(position + 1 - form.window, 0) // form.keys
    high = (position + form.keys) // form.keys
    share = (high - low + splits - 1) // splits
    begin = low + split * share
    turns = jnp.maximum(jnp.minimum(begin + share, high) - begin, 0)
    heads = bounded((member, form.group), (_dims(form), form.head_dim))
    queries = _Queries(load(qkv_ref, heads), position[None], slopes)
    held = _Row(k_ref, v_ref, k_scales, v_scales, table_ref, row, position)

    def body(turn, carry):
        keys = (begin + turn) * form.keys + jnp.arange(form.keys, dtype=jnp.int32)
        return _turn(carry, queries, held, keys, form)

    maximum, total, acc = _start(member.size, form)
    if sinks is not None:
        maximum = jnp.where(split == 0, sinks, maximum)
        total = jnp.where(split == 0, jnp.ones_like(total), total)
    maximum, total, acc = jax.lax.fori_loop(0, turns, body, (maximum, total, acc))
    real = bounded((member, form.group))
    store(maximum_ref, real, maximum)
    store(total_ref, real, total)
    store(acc_ref, heads, acc)


def combine_kernel(maximum_ref, total_ref, acc_ref, out_ref, *, form: Form):
    """One row and head: maximum, total [S], acc [S, H] -> [H]."""
    maximum = maximum_ref[...]
    fade = jnp.exp2(maximum - maximum.max())
    total = (fade * total_ref[...]).sum()
    dims = _dims(form)
    acc = load(acc_ref, bounded((jnp.arange(maximum.size), None), (dims, form.head_dim)))
    out = (fade[:, None] * acc).sum(axis=0) / jnp.where(total > 0, total, 1.0)
    store(out_ref, bounded((dims, form.head_dim)), out)


def prefill_kernel(
    qkv_ref,
    k_ref,
    v_ref,
    position_ref,
    row_ref,
    table_ref,
    *refs,
    form: Form,
    block: int,
    members: int,
    given,
):
    """A block of tokens and one kv head. qkv [T, G+2, H], pools [P W, H], table [R Pmax] -> [T, G, H]."""
    count, query = qkv_ref.shape[0], jnp.arange(block * members, dtype=jnp.int32)
    # The last tokens of a prompt see the most keys: what begins last should not take longest.
    number = pl.cdiv(count, block) - 1 - pl.program_id(1)
    token = number * block + query // members
    # One load gives a block that is multiplied from where it is; reshaped, it would go through registers every turn.
    member = (query % members, form.group if members > form.group else None)
    slopes, sinks, k_scales, v_scales, (out_ref,) = _given(refs, given, member)
    inside = jnp.minimum(token, count - 1)
    positions = jnp.where(token < count, triton.load(position_ref.at[inside]), -1)
    rows = triton.load(row_ref.at[inside])
    dims = (_dims(form), form.head_dim)
    q = load(qkv_ref, bounded([(inside, None), member], dims))
    first_row, last_row = rows.min(), rows.max()

    def one_row(index, carry):
        row = first_row + index
        mine = jnp.where(rows == row, positions, -1)
        last = mine.max()
        queries = _Queries(q, mine, slopes)
        held = _Row(k_ref, v_ref, k_scales, v_scales, table_ref, row, last)

        def body(turn, carry):
            keys = turn * form.keys + jnp.arange(form.keys, dtype=jnp.int32)
            return _turn(carry, queries, held, keys, form)

        low = 0
        if form.window is not None:
            first = jnp.where(mine >= 0, mine, np.int32(2**31 - 1)).min()
            low = jnp.maximum(first - form.window + 1, 0) // form.keys
        return jax.lax.fori_loop(low, (last + form.keys) // form.keys, body, carry)

    maximum, total, acc = _start(query.size, form)
    if sinks is not None:
        maximum, total = sinks, jnp.ones_like(total)
    _, total, acc = jax.lax.fori_loop(0, last_row - first_row + 1, one_row, (maximum, total, acc))
    out = acc / jnp.where(total > 0, total, 1.0)[:, None]
    store(out_ref, bounded([(token, count), member], dims), out)


def _given(refs: tuple[Any, ...], given: tuple[bool, ...], member: Axis) -> Any:
    """Slopes and sinks in base 2, float32[N], and the refs of the scales of keys and values, each where it was given; and the
    refs that are left."""
    left = iter(refs)
    slopes, sinks, k_scales, v_scales = (next(left) if there else None for there in given)
    slopes, sinks = (
        None if x is None else load(x, bounded(member)).astype(jnp.float32) * LOG2_E for x in (slopes, sinks)
    )
    return slopes, sinks, k_scales, v_scales, tuple(left)


class _Queries(NamedTuple):
    """What one program computes."""

    q: jax.Array
    """[M, H]"""
    position: jax.Array
    """int32[M], or [1] if it is the same for all; -1 for those of no row, or another."""
    slopes: jax.Array | None
    """float32[M], in base 2."""


class _Row(NamedTuple):
    """The keys and values that a row holds."""

    k_ref: Any
    v_ref: Any
    """Pools [P W, H]."""
    k_scales_ref: Any
    v_scales_ref: Any
    """[P W], where keys and values are int8; else None."""
    table_ref: Any
    """All rows' pages, [R Pmax]."""
    number: jax.Array
    last: jax.Array
    """Position of its last key."""


def _start(rows: int, form: Form) -> Carry:
    """Nothing seen yet."""
    acc = jnp.zeros((rows, form.width), jnp.float32)
    return jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), acc


def _turn(carry: Carry, queries: _Queries, row: _Row, keys: jax.Array, form: Form) -> Carry:
    """One block of a row's keys, at positions int32[S]."""
    maximum, total, acc = carry
    # The table ends within the last block, and behind the row's own pages may hold anything.
    index = row.number * form.table_width + jnp.minimum(keys // form.page_tokens, form.table_width - 1)
    page = jnp.clip(triton.load(row.table_ref.at[index]), 0, row.k_ref.shape[0] // form.page_tokens - 1)
    at = page * form.page_tokens + keys % form.page_tokens
    (places, inside), known = bounded((at, None), (_dims(form), form.head_dim)), keys <= row.last
    k_block = load(row.k_ref, (places, inside)).astype(queries.q.dtype)
    scores, factor = _scores(dot(queries.q, k_block.T), queries, row, keys, at, form)
    seen = keys[None, :] <= queries.position[:, None]
    if form.window is not None:
        seen &= keys[None, :] > queries.position[:, None] - form.window
    # Largest scores begin above this, so that a query's weights are 0 until it has seen a key.
    scores = jnp.where(seen, scores, -jnp.inf)
    highest = jnp.maximum(maximum, scores.max(axis=1) * factor)
    weights = jnp.exp2(scores * factor - highest[:, None])
    fade = jnp.exp2(maximum - highest)
    total = total * fade + weights.sum(axis=1)
    if row.v_scales_ref is not None:
        weights *= jnp.where(known, triton.load(row.v_scales_ref.at[at]), 0.0)[None, :]
    # A key nobody may see can hold anything, and a weight of 0 does not silence a NaN. Left out by the load, values go to the
    # matrix units from where they land; replaced after it, through registers.
    there = jnp.broadcast_to(known[:, None], (form.keys, form.width))
    inside = there if inside is None else there & inside
    values = load(row.v_ref, (places, inside)).astype(queries.q.dtype)
    return highest, total, acc * fade[:, None] + dot(weights.astype(values.dtype), values)


def _scores(
    products: jax.Array, queries: _Queries, row: _Row, keys: jax.Array, at: jax.Array, form: Form
) -> tuple[jax.Array, float]:
    """Of products [M, S] with keys at positions `keys`, and what they are yet to be multiplied with, to be in base 2."""
    scores, factor = products, form.scale
    if row.k_scales_ref is not None:
        scores *= triton.load(row.k_scales_ref.at[at])[None, :]
    if form.softcap is not None:
        scores, factor = jnp.tanh(scores * (factor / form.softcap)), form.softcap
    if queries.slopes is not None:
        distance = (keys[None, :] - queries.position[:, None]).astype(jnp.float32)
        return scores * (factor * LOG2_E) + queries.slopes[:, None] * distance, 1.0
    return scores, factor * LOG2_E


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """[M, N] @ [N, O] in float32; float32 operands keep their precision."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _dims(form: Form) -> jax.Array:
    return jnp.arange(form.width, dtype=jnp.int32)


def bounded(*axes: Axis | list[Axis]) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Where a block lies and what of it is inside, if not all. A list: axes of the array whose indices go side by side, one axis
    of the block."""
    at: list[jax.Array] = []
    inside: jax.Array | None = None
    sides = [axis if isinstance(axis, list) else [axis] for axis in axes]
    for number, side in enumerate(sides):
        for index, size in side:
            at.append(jnp.expand_dims(index, tuple(other for other in range(len(sides)) if other != number)))
            if size is not None and size != index.size:
                inside = at[-1] < size if inside is None else inside & (at[-1] < size)
    if inside is not None:
        inside = jnp.broadcast_to(inside, tuple(side[0][0].size for side in sides))
    return tuple(at), inside


def load(ref: Any, block: tuple[tuple[jax.Array, ...], jax.Array | None]) -> jax.Array:
    """A block, with zeros outside."""
    at, inside = block
    return triton.load(ref.at[at]) if inside is None else triton.load(ref.at[at], mask=inside, other=0)


def store(ref: Any, block: tuple[tuple[jax.Array, ...], jax.Array | None], value: jax.Array) -> None:
    """What of the block is inside."""
    at, inside = block
    triton.store(ref.at[at], value.astype(ref.dtype), mask=inside)
