"""What one program of the GPU's attention kernels computes, traced by Pallas: blocks of keys against queries in registers.

A row's pages are walked block by block with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). The compiler
wants powers of two, so blocks are filled up and what lies outside is neither read nor written. Knows references and
program numbers; how many programs there are, and over which arrays, is `pallas_gpu.py`'s.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ...models.attention import MASKED

LEAST_ROWS = 16
"""Rows that a matrix unit multiplies at least."""

Carry = tuple[jax.Array, jax.Array, jax.Array]
"""Of M queries: the largest score and the sum of weights, float32[M], and the sum of weighted values, float32[M, H]."""


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
    slopes, sinks, k_scales, v_scales, (maximum_ref, total_ref, acc_ref) = _given(refs, given, member, form)
    row, split = pl.program_id(0), pl.program_id(2)
    position = position_ref[row]
    low = 0 if form.window is None else jnp.maximum(position + 1 - form.window, 0) // form.keys
    high = (position + form.keys) // form.keys
    share = (high - low + splits - 1) // splits
    begin = low + split * share
    turns = jnp.maximum(jnp.minimum(begin + share, high) - begin, 0)
    heads = bounded((member, form.group), (_dims(form), form.head_dim))
    queries = _Queries(load(qkv_ref, heads), position[None], None, slopes)
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
    fade = jnp.exp(maximum - maximum.max())
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
    member = jnp.arange(members, dtype=jnp.int32)
    slopes, sinks, k_scales, v_scales, (out_ref,) = _given(refs, given, member, form)
    count, shape = qkv_ref.shape[0], (block, members)
    token = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    inside = jnp.minimum(token, count - 1)
    positions = jnp.where(token < count, triton.load(position_ref.at[inside]), -1)
    rows = triton.load(row_ref.at[inside])
    heads = bounded((inside, None), (member, form.group), (_dims(form), form.head_dim))
    q = load(qkv_ref, heads).reshape(block * members, form.width)
    query, query_row = (jnp.broadcast_to(x[:, None], shape).reshape(-1) for x in (positions, rows))
    slopes, sinks = (
        None if x is None else jnp.broadcast_to(x[None, :], shape).reshape(-1) for x in (slopes, sinks)
    )
    first_row, last_row = rows.min(), rows.max()

    def one_row(index, carry):
        row = first_row + index
        of_row = (rows == row) & (positions >= 0)
        last = jnp.where(of_row, positions, -1).max()
        low = 0
        if form.window is not None:
            first = jnp.where(of_row, positions, np.int32(2**31 - 1)).min()
            low = jnp.maximum(first - form.window + 1, 0) // form.keys
        turns = jnp.maximum((last + form.keys) // form.keys - low, 0)
        queries = _Queries(q, query, query_row == row, slopes)
        held = _Row(k_ref, v_ref, k_scales, v_scales, table_ref, row, last)

        def body(turn, carry):
            keys = (low + turn) * form.keys + jnp.arange(form.keys, dtype=jnp.int32)
            return _turn(carry, queries, held, keys, form)

        return jax.lax.fori_loop(0, turns, body, carry)

    maximum, total, acc = _start(block * members, form)
    if sinks is not None:
        maximum, total = sinks, jnp.ones_like(total)
    _, total, acc = jax.lax.fori_loop(0, last_row - first_row + 1, one_row, (maximum, total, acc))
    out = (acc / jnp.where(total > 0, total, 1.0)[:, None]).reshape(*shape, form.width)
    store(out_ref, bounded((token, count), (member, form.group), (_dims(form), form.head_dim)), out)


def _given(refs: tuple[Any, ...], given: tuple[bool, ...], member: jax.Array, form: Form) -> Any:
    """Slopes and sinks, float32[members], and the refs of the scales of keys and values, each where it was given; and the
    refs that are left."""
    left = iter(refs)
    slopes, sinks, k_scales, v_scales = (next(left) if there else None for there in given)
    heads = bounded((member, form.group))
    slopes, sinks = (None if x is None else load(x, heads).astype(jnp.float32) for x in (slopes, sinks))
    return slopes, sinks, k_scales, v_scales, tuple(left)


class _Queries(NamedTuple):
    """What one program computes."""

    q: jax.Array
    """[M, H]"""
    position: jax.Array
    """int32[M], or [1] if it is the same for all."""
    mine: jax.Array | None
    """bool[M]: which belong to the row that is looked at; None if all."""
    slopes: jax.Array | None
    """float32[M]"""


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
    block = bounded((at, None), (_dims(form), form.head_dim))
    scores = dot(queries.q, load(row.k_ref, block).astype(queries.q.dtype).T) * form.scale
    if row.k_scales_ref is not None:
        scores *= triton.load(row.k_scales_ref.at[at])[None, :]
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    if queries.slopes is not None:
        scores += queries.slopes[:, None] * (keys[None, :] - queries.position[:, None]).astype(jnp.float32)
    seen = keys[None, :] <= queries.position[:, None]
    if form.window is not None:
        seen &= keys[None, :] > queries.position[:, None] - form.window
    if queries.mine is not None:
        seen &= queries.mine[:, None]
    scores = jnp.where(seen, scores, MASKED)
    highest = jnp.maximum(maximum, scores.max(axis=1))
    weights = jnp.where(seen, jnp.exp(scores - highest[:, None]), 0.0)
    fade = jnp.exp(maximum - highest)
    total = total * fade + weights.sum(axis=1)
    if row.v_scales_ref is not None:
        weights *= jnp.where(keys <= row.last, triton.load(row.v_scales_ref.at[at]), 0.0)[None, :]
    # A key nobody may see can hold anything, and a weight of 0 does not silence a NaN.
    values = load(row.v_ref, block).astype(queries.q.dtype)
    values = jnp.where((keys <= row.last)[:, None], values, jnp.zeros((), values.dtype))
    acc = acc * fade[:, None] + dot(weights.astype(values.dtype), values)
    return highest, total, acc


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """[M, N] @ [N, O] in float32; float32 operands keep their precision."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _dims(form: Form) -> jax.Array:
    return jnp.arange(form.width, dtype=jnp.int32)


def bounded(*axes: tuple[jax.Array, int | None]) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Where a block lies, from the indices along each axis and the axis' size (None: all are inside), and what of it is
    inside, if not all."""
    others = [tuple(other for other in range(len(axes)) if other != axis) for axis in range(len(axes))]
    at = tuple(jnp.expand_dims(index, axis) for (index, _), axis in zip(axes, others, strict=True))
    checks = [i < size for i, (_, size) in zip(at, axes, strict=True) if size is not None and size != i.size]
    if not checks:
        return at, None
    inside = checks[0]
    for check in checks[1:]:
        inside = inside & check
    return at, jnp.broadcast_to(inside, tuple(index.size for index, _ in axes))


def load(ref: Any, block: tuple[tuple[jax.Array, ...], jax.Array | None]) -> jax.Array:
    """A block, with zeros outside."""
    at, inside = block
    return triton.load(ref.at[at]) if inside is None else triton.load(ref.at[at], mask=inside, other=0)


def store(ref: Any, block: tuple[tuple[jax.Array, ...], jax.Array | None], value: jax.Array) -> None:
    """What of the block is inside."""
    at, inside = block
    triton.store(ref.at[at], value.astype(ref.dtype), mask=inside)
