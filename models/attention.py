"""Matmul and paged attention in plain XLA: what runs where no kernel is better, and the reference for those that are.

Cost follows the tokens that rows hold, not the width of the page table: loops over blocks of pages end where the
longest row (decode) or the last block (prefill) ends. Softmax is accumulated block by block (Milakov and Gimelshein
2018; Rabe and Staats 2021), so no array of prompt times context exists. Knows nothing of requests.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..sharding.axes import LogicalAxis
from ..sharding.mesh import Placement
from .grouped import in_turns, ragged
from .kernels import AnyPool, KvLayer, PagedBatch, Weight
from .quantize import operand, vectors_to_int8
from .rowwise import PlainRows

BLOCK_TOKENS = 128
"""Keys looked at per turn of the loop: large enough to hide the loop, small enough to waste little at the end."""

MASKED = -1e30
"""Stands for minus infinity, but two of them subtract to 0 and not to NaN."""


class XlaKernels(AnyPool, PlainRows):
    """`Kernels` in plain XLA, for any platform and mesh."""

    name = "xla"
    packed = False

    def __init__(self, platform: str, placement: Placement | None = None) -> None:
        """`placement` is how several devices are arranged; None for one."""
        self._cpu = platform == "cpu"
        self.placement = placement

    def linear(self, x: jax.Array, weight: Weight, outputs: int) -> jax.Array:
        """x [T, D] @ weight [..., D] -> [T, outputs]."""
        weight, scales = operand(weight, x.dtype)
        if self._cpu and 1 < x.shape[0] <= 64:
            # XLA:CPU repacks its right operand at each call; with few rows the weight must be the left one.
            product = jax.lax.dot_general(
                weight,
                x,
                (((weight.ndim - 1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            product = jnp.moveaxis(product, -1, 0)
        else:
            # Accelerators add up in float32 whatever the result's type, and would write a float32 result out to convert it;
            # what is scaled in float32 is converted behind that.
            product = jax.lax.dot_general(
                x,
                weight,
                (((1,), (weight.ndim - 1,)), ((), ())),
                preferred_element_type=jnp.float32 if self._cpu or scales is not None else x.dtype,
            )
        if scales is not None:
            product = product * scales[None]
        return product.reshape(x.shape[0], outputs).astype(x.dtype)

    def grouped_linear(self, x: jax.Array, weight: Weight, sizes: jax.Array, outputs: int) -> jax.Array:
        """See `Kernels.grouped_linear`."""
        product = in_turns(x, weight, sizes) if self._cpu else ragged(x, weight, sizes)
        return product.reshape(x.shape[0], outputs).astype(x.dtype)

    def attend(
        self,
        qkv: jax.Array,
        kv: KvLayer,
        batch: PagedBatch,
        *,
        window: int | None,
        scale: float,
        one_token_rows: int,
        softcap: float | None = None,
        slopes: tuple[float, ...] = (),
        sinks: jax.Array | None = None,
        value_dim: int | None = None,
    ) -> tuple[jax.Array, KvLayer]:
        """See `Kernels.attend`."""
        tokens, kv_heads, members, head_dim = qkv.shape
        group = members - (2 if value_dim is None else 1)
        value = qkv[:, :, group + 1] if value_dim is None else None
        kv = write(kv, qkv[:, :, group], value, batch, self.placement)
        # [K, T, G, H]: the kv head leads, as in the pool, so that XLA transposes queries and never the pool.
        grouped = qkv[:, :, :group].swapaxes(0, 1).astype(jnp.float32) * scale
        by_head = np.array(slopes, np.float32).reshape(kv_heads, 1, group, 1) if slopes else None
        adjust = _adjustment(softcap, by_head)
        parts = [
            attend(grouped[:, part], kv, own, window, adjust, sinks, value_dim or head_dim)
            for attend, part, own in in_parts(batch, one_token_rows, _attend_rows, _attend_packed)
        ]
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        return out.swapaxes(0, 1).reshape(tokens, kv_heads * group, -1).astype(qkv.dtype), kv


def in_parts(
    batch: PagedBatch, one_token_rows: int, rows: Any, packed: Any
) -> list[tuple[Any, slice, PagedBatch]]:
    """Who attends which tokens, and their batch: `rows` the first ones, which are a row each, `packed` what is left."""
    n, tokens = one_token_rows, batch.positions.shape[0]
    parts = [
        (rows, slice(0, n), PagedBatch(batch.positions[:n], batch.rows[:n], batch.table[:n])),
        (packed, slice(n, tokens), PagedBatch(batch.positions[n:], batch.rows[n:], batch.table)),
    ]
    return [part for part in parts if part[1].stop > part[1].start]


def on_devices(attend: Any, placement: Placement | None, *, table_by_token: bool) -> Any:
    """A kernel's attention (queries [T, K, …], pool, batch, and two by kv head) where several devices each attend with the kv heads,
    and the part of the tokens, that lie there. `table_by_token`: a row is a token."""
    if (place := placement) is None:
        return attend
    heads: Any = place.sharding(("kv_heads",)).spec

    def spread(queries: jax.Array, *rest: Any) -> jax.Array:
        # A prompt's tokens need not divide over the axis of the lanes.
        lying: Any = place.fitted(("tokens", "kv_heads", None, None), queries.shape).spec
        by_token: Any = place.fitted(("tokens",), queries.shape[:1]).spec
        table: Any = by_token if table_by_token else place.replicated.spec
        inputs = (lying, heads, PagedBatch(by_token, by_token, table), heads, heads)
        part = jax.shard_map(attend, mesh=place.mesh, in_specs=inputs, out_specs=lying, check_vma=False)
        return part(queries, *rest)

    return spread


def write(
    kv: KvLayer, k: jax.Array, v: jax.Array | None, batch: PagedBatch, placement: Placement | None
) -> KvLayer:
    """Put k, v [T, K, H] where their rows' pages are; padding is dropped. In place when the pool is donated. v is None where
    the pool has no values."""
    if placement is None:
        return _write(kv, k, v, batch)
    # Each device its own heads: XLA does not see that what is named by number stays where it is.
    heads = kv_axis(latent=v is None)
    pool, new = placement.sharding((heads,)).spec, placement.sharding((None, heads)).spec
    specs = (pool, new, new, placement.replicated.spec)
    return jax.shard_map(_write, mesh=placement.mesh, in_specs=specs, out_specs=pool, check_vma=False)(
        kv, k, v, batch
    )


def kv_axis(*, latent: bool) -> LogicalAxis | None:
    """What the heads of the pool are split over; the one that all query heads read is whole on every device."""
    return None if latent else "kv_heads"


def _write(kv: KvLayer, k: jax.Array, v: jax.Array | None, batch: PagedBatch) -> KvLayer:
    """See `write`, on one device."""
    pages, page_tokens = kv.k.shape[1:3]
    index = jnp.clip(batch.positions // page_tokens, 0, batch.table.shape[1] - 1)
    page = jnp.where(batch.positions >= 0, batch.table[batch.rows, index], pages)
    slot = jnp.maximum(batch.positions, 0) % page_tokens
    # Every head by number: for a slice over the heads XLA:TPU turns the whole pool round and back.
    head = jnp.arange(kv.k.shape[0], dtype=jnp.int32)[:, None]

    def put(pool: jax.Array, new: jax.Array) -> jax.Array:
        return pool.at[head, page[None], slot[None]].set(new.swapaxes(0, 1).astype(pool.dtype), mode="drop")

    def stored(
        pool: jax.Array, scales: jax.Array | None, new: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        if scales is None:
            return put(pool, new), None
        steps, new_scales = vectors_to_int8(new)
        return put(pool, steps), put(scales, new_scales)

    keys, k_scales = stored(kv.k, kv.k_scales, k)
    if kv.v is None or v is None:
        return KvLayer(keys, None, k_scales)
    values, v_scales = stored(kv.v, kv.v_scales, v)
    return KvLayer(keys, values, k_scales, v_scales)


def _read(kv: KvLayer, pages: jax.Array, value_dim: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of pages [..., n]; where the pool has no values they are the first numbers of the keys."""
    keys = _held(kv.k, kv.k_scales, pages)
    return keys, keys[..., :value_dim] if kv.v is None else _held(kv.v, kv.v_scales, pages)


def _held(pool: jax.Array, scales: jax.Array | None, pages: jax.Array) -> jax.Array:
    """What pages [..., n] hold, one behind the other: float32[K, ..., n W, H]."""
    kv_heads, _, page_tokens, head_dim = pool.shape
    shape = (kv_heads, *pages.shape[:-1], pages.shape[-1] * page_tokens)
    held = pool[:, pages].reshape(*shape, head_dim).astype(jnp.float32)
    return held if scales is None else held * scales[:, pages].reshape(*shape, 1)


def _block_pages(table: jax.Array, page_tokens: int) -> tuple[jax.Array, int]:
    """The table padded to whole blocks, and the number of pages in a block."""
    count = max(1, min(BLOCK_TOKENS // page_tokens, table.shape[1]))
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % count))), count


def _accumulate(carry, scores, seen, values, pattern: str):
    """One block of online softmax. scores, seen [..., S]; values by `pattern` -> new (maximum, total, sum).

    Values of keys that no query may see must be finite: a weight of 0 does not silence a NaN.
    """
    maximum, total, acc = carry
    scores = jnp.where(seen, scores, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - new_maximum[..., None]), 0.0)
    fade = jnp.exp(maximum - new_maximum)
    acc = acc * fade[..., None] + jnp.einsum(pattern, weights, values, preferred_element_type=jnp.float32)
    return new_maximum, total * fade + weights.sum(axis=-1), acc


def _keys(block: jax.Array, size: int) -> jax.Array:
    """int32[1, 1, 1, S]: the positions of a block's keys."""
    return (block * size + jnp.arange(size, dtype=jnp.int32))[None, None, None, :]


def _visible(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """Causal, and inside the window if there is one."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


Adjust = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Scores, query positions, key positions -> scores."""


def _adjustment(softcap: float | None, slopes: np.ndarray | None) -> Adjust:
    """What happens to scaled scores before the softmax. slopes float32[K, 1, G, 1], or None."""

    def adjust(scores: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        return scores if slopes is None else scores + slopes * (key - query).astype(jnp.float32)

    return adjust


def _attend_rows(
    q: jax.Array,
    kv: KvLayer,
    batch: PagedBatch,
    window: int | None,
    adjust: Adjust,
    sinks: jax.Array | None,
    value_dim: int,
) -> jax.Array:
    """Decode: row t has one query. q [K, T, G, H] -> [K, T, G, value_dim]."""
    page_tokens = kv.k.shape[2]
    table, count = _block_pages(batch.table, page_tokens)
    size = count * page_tokens
    position = batch.positions[None, :, None, None]

    def body(block: jax.Array, carry):
        pages = jax.lax.dynamic_slice_in_dim(table, block * count, count, axis=1)
        held, values = _read(kv, pages, value_dim)
        scores = jnp.einsum("ktgh,ktsh->ktgs", q, held)
        keys = _keys(block, size)
        scores = adjust(scores, position, keys)
        values = jnp.where((keys <= position).swapaxes(2, 3), values, 0.0)
        return _accumulate(carry, scores, _visible(position, keys, window), values, "ktgs,ktsh->ktgh")

    blocks = (batch.positions.max() + size) // size
    return _run(blocks, body, q.shape[:3], value_dim, sinks)


def _attend_packed(
    q: jax.Array,
    kv: KvLayer,
    batch: PagedBatch,
    window: int | None,
    adjust: Adjust,
    sinks: jax.Array | None,
    value_dim: int,
) -> jax.Array:
    """Prefill: several rows' tokens side by side. Each turn takes one block of one row. q [K, T, G, H] as for decode."""
    page_tokens = kv.k.shape[2]
    table, count = _block_pages(batch.table, page_tokens)
    size = count * page_tokens
    held = jnp.zeros(table.shape[0], jnp.int32).at[batch.rows].max(batch.positions + 1)
    row_blocks = (held + size - 1) // size
    ends = jnp.cumsum(row_blocks)
    position = batch.positions[None, :, None, None]

    def body(turn: jax.Array, carry):
        row = jnp.searchsorted(ends, turn, side="right").astype(jnp.int32)
        block = turn - (ends[row] - row_blocks[row])
        pages = jax.lax.dynamic_slice(table, (row, block * count), (1, count))[0]
        read, values = _read(kv, pages, value_dim)
        scores = jnp.einsum("ktgh,ksh->ktgs", q, read)
        keys = _keys(block, size)
        scores = adjust(scores, position, keys)
        values = jnp.where((keys < held[row]).swapaxes(2, 3)[0], values, 0.0)
        new = _accumulate(carry, scores, _visible(position, keys, window), values, "ktgs,ksh->ktgh")
        # What a row holds must not reach another's tokens, not even as 0 times NaN.
        mine = (batch.rows == row)[None, :, None]
        return tuple(
            jnp.where(mine if x.ndim == 3 else mine[..., None], x, old) for x, old in zip(new, carry)
        )

    return _run(ends[-1], body, q.shape[:3], value_dim, sinks)


def _run(
    turns: jax.Array, body, shape: tuple[int, ...], value_dim: int, sinks: jax.Array | None
) -> jax.Array:
    """Loop `body` and normalise; queries that saw nothing (padding) give 0. A sink [K, G] is a key already seen, of value 0."""
    maximum, total = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    if sinks is not None:
        maximum = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, :], shape)
        total = jnp.ones(shape, jnp.float32)
    start = (maximum, total, jnp.zeros((*shape, value_dim), jnp.float32))
    _, total, acc = jax.lax.fori_loop(0, turns, body, start)
    return acc / jnp.where(total > 0, total, 1.0)[..., None]


def default_scale(head_dim: int) -> float:
    """1/sqrt(H), Vaswani et al. 2017."""
    return 1.0 / math.sqrt(head_dim)
