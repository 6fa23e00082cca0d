"""What the TPU's attention kernels compute, traced by Pallas: blocks of keys out of HBM against queries in VMEM.

A row's pages are walked block by block with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). While one
block is computed the next one's pages travel, across the borders between rows, blocks of queries and heads too, so the
memory never rests. Knows references; how many programs there are, and over which arrays, is `pallas_tpu.py`'s.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...models.attention import MASKED

BLOCK_TOKENS = 256
"""Keys of a turn: large enough that a transfer outlasts its start, small enough to waste little at a row's end."""


class Form(NamedTuple):
    """What is the same for all launches of a layer."""

    scale: float
    softcap: float | None
    window: int | None
    sloped: bool
    page_tokens: int
    table_width: int


def blocks(first: jax.Array, last: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first and last block that queries at positions `first` … `last` see; padding, at -1, has one of which it sees
    nothing."""

    def block(at: jax.Array) -> jax.Array:
        # Not `//`: of numbers below 0, which there are none, it would need to know the very chip.
        return jax.lax.div(jnp.maximum(at, 0), jnp.int32(BLOCK_TOKENS))

    end = block(last)
    return (jnp.zeros_like(end) if window is None else block(first - window + 1)), end


class _Block(NamedTuple):
    """Keys and values [k, S, H] of a block, of int8 as they are, and what they are to be multiplied with, float32[k, S]."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None
    value_scales: jax.Array | None


class _Stream(NamedTuple):
    """The way of keys and values from the pools [K, P, W, H], of int8 with their scales' [K, P, W], to two buffers each,
    [2, k, S, H] and [2, k, S], that take turns."""

    pools: tuple[Any, ...]
    buffers: tuple[Any, ...]
    arrived: Any
    """Semaphores [2 or 4, 2]: of each pool, of each buffer."""
    table: Any
    """int32[R Pmax]"""
    form: Form

    def move(
        self, act: str, heads: Any, row: jax.Array, last: jax.Array, block: jax.Array, slot: Any
    ) -> None:
        """`start` or `wait` for the pages of a row's block; those behind position `last` are left out."""
        width = min(self.form.page_tokens, BLOCK_TOKENS)
        of_page = jnp.int32(self.form.page_tokens // width)  # a page may be several blocks
        for index in range(BLOCK_TOKENS // width):
            number = block * (BLOCK_TOKENS // width) + index

            @pl.when(number * width <= last)
            def _(index: int = index, number: jax.Array = number):
                page = self.table[row * self.form.table_width + jax.lax.div(number, of_page)]
                begin = pl.multiple_of(jax.lax.rem(number, of_page) * width, width)
                place = pl.ds(index * width, width)
                for which, (pool, buffer) in enumerate(zip(self.pools, self.buffers, strict=True)):
                    source, target = pool.at[heads, page, pl.ds(begin, width)], buffer.at[slot, :, place]
                    getattr(pltpu.make_async_copy(source, target, self.arrived.at[which, slot]), act)()

    def read(self, slot: Any, block: jax.Array, last: jax.Array, dtype: Any) -> _Block:
        """What a buffer holds of a block, of a row that ends at `last`."""
        key, value, *scales = (buffer[slot] for buffer in self.buffers)
        if not scales:
            return _Block(key, _held(value, block, last), None, None)
        # No int8 is a NaN, but a scale may be one.
        return _Block(key.astype(dtype), value.astype(dtype), scales[0], _held(scales[1], block, last))


def decode_kernel(*refs: Any, form: Form) -> None:
    """All rows and kv heads, a query a row, in one loop. The number of turns int32[1], the positions int32[T] and the
    table are scalars; q [T, K, G, H], slope and sink float32[K, G, 1], pools in HBM -> [T, K, G, H]."""
    turns, positions, table, q, slope, sink, pools, out, buffers, arrived, sums = refs
    maximum, total, acc = sums
    stream = _Stream(pools, buffers, arrived, table, form)
    rows = positions.shape[0]

    def move(act: str, row: jax.Array, block: jax.Array, slot: Any) -> None:
        stream.move(act, slice(None), row, positions[row], block, slot)

    def begin(row: jax.Array) -> jax.Array:
        return blocks(positions[row], positions[row], form.window)[0]

    def turn(count: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, block = at
        slot = jax.lax.rem(count, 2)
        position = positions[row]
        first, last = blocks(position, position, form.window)
        ends = block == last
        following = jnp.minimum(row + 1, rows - 1)
        next_row = jnp.where(ends, following, row)
        next_block = jnp.where(ends, begin(following), block + 1)

        @pl.when(count + 1 < turns[0])
        def _():
            move("start", next_row, next_block, 1 - slot)

        move("wait", row, block, slot)

        @pl.when(block == first)
        def _():
            _begin(sums, sink[...])

        keys, values, key_scales, value_scales = stream.read(slot, block, position, q.dtype)
        scores = _dot(q[row], keys, (((2,), (2,)), ((0,), (0,))))
        scores = scores if key_scales is None else scores * key_scales[:, None]
        key = block * BLOCK_TOKENS + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        weights, fade = _weigh(scores, key, position, key <= position, slope[...], maximum, total, form)
        weights = weights if value_scales is None else weights * value_scales[:, None]
        acc[...] = acc[...] * fade + _dot(weights.astype(values.dtype), values, (((2,), (1,)), ((0,), (0,))))

        @pl.when(ends)
        def _():
            out[row] = _mean(sums).astype(out.dtype)

        return next_row, next_block

    start = jnp.int32(0), begin(jnp.int32(0))
    move("start", *start, 0)
    jax.lax.fori_loop(0, turns[0], turn, start)


def prefill_kernel(*refs: Any, form: Form) -> None:
    """A kv head and a block of U tokens, which several rows may share: a piece of each is attended behind the other. Scalars
    are positions, rows and `ends` int32[T], where the piece of each token ends, and the table; q [G, U, H], slope and
    sink float32[G, 1, 1], pools in HBM -> [G, U, H]. Each program begins what the next one waits for."""
    positions, rows, ends, table, q, slope, sink, pools, out, buffers, arrived, turns, sums = refs
    maximum, total, acc = sums
    stream = _Stream(pools, buffers, arrived, table, form)
    head, number = pl.program_id(0), pl.program_id(1)
    tokens, (group, size, head_dim) = positions.shape[0], q.shape
    by_query = group * size

    def span(piece: jax.Array) -> tuple[jax.Array, jax.Array]:
        return blocks(positions[piece], positions[ends[piece] - 1], form.window)

    def move(act: str, head: jax.Array, piece: jax.Array, block: jax.Array, slot: Any) -> None:
        stream.move(act, pl.ds(head, 1), rows[piece], positions[ends[piece] - 1], block, slot)

    def follow(piece: jax.Array, block: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Begin what comes next; behind the last token comes the next head's first."""
        finished, end = block == span(piece)[1], ends[piece]
        over = finished & (end == tokens)
        next_piece = jnp.where(over, 0, jnp.where(finished, end, piece))
        next_block = jnp.where(finished, span(next_piece)[0], block + 1)
        next_head = head + over.astype(jnp.int32)

        @pl.when(next_head < pl.num_programs(0))
        def _():
            move("start", next_head, next_piece, next_block, 1 - slot)

        return jnp.where(finished, end, piece), next_block

    def turn(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        piece, block = at
        slot = jax.lax.rem(turns[0], 2)
        turns[0] += 1
        following = follow(piece, block, slot)
        move("wait", head, piece, block, slot)
        last = positions[ends[piece] - 1]
        keys, values, key_scales, value_scales = stream.read(slot, block, last, q.dtype)
        scores = _dot(q[...].reshape(by_query, head_dim), keys[0], (((1,), (1,)), ((), ())))
        scores = scores if key_scales is None else scores * key_scales
        scores = scores.reshape(group, size, BLOCK_TOKENS)
        key = block * BLOCK_TOKENS + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        behind = number * size - piece + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        query = positions[piece] + behind
        seen = (key <= query) & (behind >= 0) & (query <= last)
        weights, fade = _weigh(scores, key, query, seen, slope[...], maximum, total, form)
        weights = weights.reshape(by_query, BLOCK_TOKENS)
        weights = weights if value_scales is None else weights * value_scales
        product = _dot(weights.astype(values.dtype), values[0], (((1,), (0,)), ((), ())))
        acc[...] = acc[...] * fade + product.reshape(acc.shape)
        return following

    start = jnp.int32(number * size)

    @pl.when((head == 0) & (number == 0))
    def _():
        turns[0] = 0
        move("start", head, start, span(start)[0], 0)

    _begin(sums, sink[...])
    jax.lax.while_loop(lambda at: at[0] < (number + 1) * size, turn, (start, span(start)[0]))
    out[...] = _mean(sums).astype(out.dtype)


def _begin(sums: Any, sink: jax.Array) -> None:
    """Nothing seen yet but the sink; one that weighs nothing stands where there is none."""
    maximum, total, acc = sums
    maximum[...] = jnp.broadcast_to(sink, maximum.shape)
    total[...] = jnp.broadcast_to(jnp.where(sink > MASKED, 1.0, 0.0), total.shape)
    acc[...] = jnp.zeros_like(acc)


def _weigh(scores, key, query, seen, slope, maximum, total, form: Form) -> tuple[jax.Array, jax.Array]:
    """One block of online softmax: raw scores [A, B, S] -> the keys' weights [A, B, S], and what is left of earlier sums
    [A, B, 1]. `maximum` and `total` [A, B, 1] go on."""
    scores = scores * form.scale
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    if form.sloped:
        scores = scores + slope * (key - query).astype(jnp.float32)
    if form.window is not None:
        seen &= key > query - form.window
    scores = jnp.where(seen, scores, MASKED)
    highest = jnp.maximum(maximum[...], scores.max(axis=2, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - highest), 0.0)
    fade = jnp.exp(maximum[...] - highest)
    total[...] = total[...] * fade + weights.sum(axis=2, keepdims=True)
    maximum[...] = highest
    return weights, fade


def _held(values: jax.Array, block: jax.Array, last: jax.Array) -> jax.Array:
    """What lies behind a row's last token is nobody's or another's: a weight of 0 does not silence a NaN. [k, S, …]"""
    key = block * BLOCK_TOKENS + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.where(key <= last, values, jnp.zeros_like(values))


def _mean(sums: Any) -> jax.Array:
    """The weighted mean; 0 for a query that saw nothing."""
    _, total, acc = sums
    return acc[...] / jnp.where(total[...] > 0, total[...], 1.0)


def _dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
