"""Paged attention on NVIDIA GPUs: Pallas kernels for decode and for packed prefill.

Both walk the pages of a row block by block with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022), and
read no page that the row does not hold. Decode splits a row's keys over several programs, so that few rows fill the
device too, and a second kernel adds the parts up (split-K: Dao et al. 2023, "Flash-Decoding"). Matrix products are XLA's.
Lowered through Triton; `interpret` runs the same kernels anywhere. Knows arrays only, no requests.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ...models.attention import MASKED, XlaKernels, write
from ...models.kernels import KvLayer, PagedBatch
from ...sharding.mesh import Placement

DECODE_KEYS, PREFILL_KEYS = 64, 128
"""Keys looked at per turn of a loop, at most."""

QUERY_ROWS = 128
"""Queries times heads of one kv head that a prefill program computes, at most."""

TILE_BYTES = 2**15
"""Of queries, and of a block's keys: larger ones take minutes to compile and leave no room for a second block."""

LEAST_ROWS = 16
"""Rows that a matrix unit multiplies at least."""

PROGRAMS = 528
"""Decode programs that keep a device busy: 4 for each of 132 multiprocessors. Rows are split until there are as many."""

MOST_SPLITS = 32

FLIGHT_BYTES = 2**17
"""Keys and values under way to one program at once. A multiprocessor has 227 KiB for them and the queries."""

Carry = tuple[jax.Array, jax.Array, jax.Array]
"""Of M queries: the largest score and the sum of weights, float32[M], and the sum of weighted values, float32[M, H]."""


class _Form(NamedTuple):
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


class PallasGpuKernels(XlaKernels):
    """`Kernels` whose attention is the kernels of this file and whose products are XLA's."""

    name = "pallas"

    def __init__(self, placement: Placement | None = None, *, interpret: bool = False) -> None:
        """`placement` is how several devices are arranged; None for one. `interpret` runs on any platform, slowly."""
        super().__init__("gpu", placement)
        self._interpret = interpret

    def attend(
        self,
        qkv: jax.Array,
        kv: KvLayer,
        batch: PagedBatch,
        *,
        window: int | None,
        scale: float,
        one_token_rows: bool,
        softcap: float | None = None,
        slopes: tuple[float, ...] = (),
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, KvLayer]:
        """See `Kernels.attend`."""
        tokens, kv_heads, members, head_dim = qkv.shape
        group = members - 2
        kv = write(kv, qkv[:, :, group], qkv[:, :, group + 1], batch)
        most = DECODE_KEYS if one_token_rows else PREFILL_KEYS
        keys = min(most, _tile_rows(head_dim, qkv.dtype))
        form = _Form(scale, softcap, window, kv.k.shape[2], batch.table.shape[1], group, head_dim, keys)
        slope = jnp.asarray(np.array(slopes, np.float32).reshape(kv_heads, group)) if slopes else None
        attend = partial(
            decode_attention if one_token_rows else prefill_attention, form=form, interpret=self._interpret
        )
        out = self._spread(attend, one_token_rows)(qkv, kv, batch, slope, sinks)
        return out.reshape(tokens, kv_heads * group, head_dim), kv

    def _spread(self, attend: Any, one_token_rows: bool) -> Any:
        """Each device attends with the kv heads, and the part of the tokens, that lie there."""
        if self.placement is None:
            return attend
        axes = (
            ("kv_heads",),
            ("kv_heads", None, None, None),
            ("tokens",),
            ("tokens", "kv_heads", None, None),
        )
        specs: list[Any] = [self.placement.sharding(each).spec for each in axes]
        heads, pool, by_token, queries = specs
        table: Any = by_token if one_token_rows else self.placement.replicated.spec
        return jax.shard_map(
            attend,
            mesh=self.placement.mesh,
            in_specs=(
                queries,
                KvLayer(pool, pool, heads, heads),
                PagedBatch(by_token, by_token, table),
                heads,
                heads,
            ),
            out_specs=queries,
            check_vma=False,
        )


def decode_attention(
    qkv: jax.Array,
    kv: KvLayer,
    batch: PagedBatch,
    slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    form: _Form,
    interpret: bool,
) -> jax.Array:
    """One query a row: qkv [T, K, G+2, H], slopes and sinks [K, G] or None -> [T, K, G, H] in its type."""
    rows, kv_heads = qkv.shape[:2]
    splits = _splits(rows * kv_heads, form.table_width * form.page_tokens // form.keys)
    given, by_head = _per_head(slopes, sinks, kv)
    part = jax.ShapeDtypeStruct((splits, rows, kv_heads, form.group), jnp.float32)
    parts = pl.pallas_call(
        partial(_decode_kernel, form=form, splits=splits, given=by_head),
        grid=(rows, kv_heads, splits),
        in_specs=[
            pl.BlockSpec((None, None, *qkv.shape[2:]), lambda t, k, s: (t, k, 0, 0)),
            *[pl.BlockSpec((None, *_flat(kv.k).shape[1:]), lambda t, k, s: (k, 0, 0))] * 2,
            pl.BlockSpec(batch.positions.shape, lambda t, k, s: (0,)),
            pl.BlockSpec((batch.table.size,), lambda t, k, s: (0,)),
            *[pl.BlockSpec((None, x.shape[1]), lambda t, k, s: (k, 0)) for x in given],
        ],
        out_specs=[
            *[pl.BlockSpec((None, None, None, form.group), lambda t, k, s: (s, t, k, 0))] * 2,
            pl.BlockSpec((None, None, None, form.group, form.head_dim), lambda t, k, s: (s, t, k, 0, 0)),
        ],
        out_shape=[part, part, jax.ShapeDtypeStruct((*part.shape, form.head_dim), jnp.float32)],
        compiler_params=_tuned(qkv, form, warps=4),
        interpret=interpret,
        name="xlane_decode_attention",
    )(qkv, _flat(kv.k), _flat(kv.v), batch.positions, batch.table.reshape(-1), *given)
    each = pl.BlockSpec((splits, None, None, None), lambda t, k, g: (0, t, k, g))
    return pl.pallas_call(
        partial(_combine_kernel, form=form),
        grid=(rows, kv_heads, form.group),
        in_specs=[
            each,
            each,
            pl.BlockSpec((splits, None, None, None, form.head_dim), lambda t, k, g: (0, t, k, g, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, None, form.head_dim), lambda t, k, g: (t, k, g, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, kv_heads, form.group, form.head_dim), qkv.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="xlane_combine_attention",
    )(*parts)


def prefill_attention(
    qkv: jax.Array,
    kv: KvLayer,
    batch: PagedBatch,
    slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    form: _Form,
    interpret: bool,
) -> jax.Array:
    """Tokens of several rows side by side: qkv [T, K, G+2, H], slopes and sinks [K, G] or None -> [T, K, G, H] in its type."""
    tokens, kv_heads = qkv.shape[:2]
    members = pl.next_power_of_2(form.group)
    block = max(1, min(QUERY_ROWS, _tile_rows(form.head_dim, qkv.dtype)) // members)
    given, by_head = _per_head(slopes, sinks, kv)
    whole_tokens = pl.BlockSpec((tokens,), lambda t, k: (0,))
    return pl.pallas_call(
        partial(_prefill_kernel, form=form, block=block, members=members, given=by_head),
        grid=(pl.cdiv(tokens, block), kv_heads),
        in_specs=[
            pl.BlockSpec((tokens, None, *qkv.shape[2:]), lambda t, k: (0, k, 0, 0)),
            *[pl.BlockSpec((None, *_flat(kv.k).shape[1:]), lambda t, k: (k, 0, 0))] * 2,
            whole_tokens,
            whole_tokens,
            pl.BlockSpec((batch.table.size,), lambda t, k: (0,)),
            *[pl.BlockSpec((None, x.shape[1]), lambda t, k: (k, 0)) for x in given],
        ],
        out_specs=pl.BlockSpec((tokens, None, form.group, form.head_dim), lambda t, k: (0, k, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((tokens, kv_heads, form.group, form.head_dim), qkv.dtype),
        compiler_params=_tuned(qkv, form, warps=8),
        interpret=interpret,
        name="xlane_prefill_attention",
    )(qkv, _flat(kv.k), _flat(kv.v), batch.positions, batch.rows, batch.table.reshape(-1), *given)


def _tile_rows(head_dim: int, dtype: Any) -> int:
    """How many heads, of queries or of keys, make a tile."""
    return TILE_BYTES // (pl.next_power_of_2(head_dim) * jnp.dtype(dtype).itemsize)


def _splits(programs: int, most_blocks: int) -> int:
    """Parts of a row, a power of two: enough for a full device, each of a block at least."""
    wanted = min(MOST_SPLITS, -(-PROGRAMS // programs), most_blocks)
    return pl.next_power_of_2(max(1, wanted))


def _tuned(qkv: jax.Array, form: _Form, warps: int) -> triton.CompilerParams:
    """As many blocks under way as there is room for."""
    block_bytes = 2 * form.keys * form.width * qkv.dtype.itemsize
    return triton.CompilerParams(num_warps=warps, num_stages=max(1, min(4, FLIGHT_BYTES // block_bytes)))


def _flat(pool: jax.Array) -> jax.Array:
    """[K, P, W, H] seen as [K, P W, H]."""
    return pool.reshape(pool.shape[0], -1, pool.shape[-1])


def _per_head(
    slopes: jax.Array | None, sinks: jax.Array | None, kv: KvLayer
) -> tuple[list[jax.Array], tuple[bool, ...]]:
    """What there is that has a row [K, …] for each kv head, and which of the four that is."""
    scales = [None if x is None else x.reshape(x.shape[0], -1) for x in (kv.k_scales, kv.v_scales)]
    there = [slopes, sinks, *scales]
    return [x for x in there if x is not None], tuple(x is not None for x in there)


def _decode_kernel(qkv_ref, k_ref, v_ref, position_ref, table_ref, *refs, form: _Form, splits: int, given):
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
    heads = _bounded((member, form.group), (_dims(form), form.head_dim))
    queries = _Queries(_load(qkv_ref, heads), position[None], None, slopes)
    held = _Row(k_ref, v_ref, k_scales, v_scales, table_ref, row, position)

    def body(turn, carry):
        keys = (begin + turn) * form.keys + jnp.arange(form.keys, dtype=jnp.int32)
        return _turn(carry, queries, held, keys, form)

    maximum, total, acc = _start(member.size, form)
    if sinks is not None:
        maximum = jnp.where(split == 0, sinks, maximum)
        total = jnp.where(split == 0, jnp.ones_like(total), total)
    maximum, total, acc = jax.lax.fori_loop(0, turns, body, (maximum, total, acc))
    real = _bounded((member, form.group))
    _store(maximum_ref, real, maximum)
    _store(total_ref, real, total)
    _store(acc_ref, heads, acc)


def _combine_kernel(maximum_ref, total_ref, acc_ref, out_ref, *, form: _Form):
    """One row and head: maximum, total [S], acc [S, H] -> [H]."""
    maximum = maximum_ref[...]
    fade = jnp.exp(maximum - maximum.max())
    total = (fade * total_ref[...]).sum()
    dims = _dims(form)
    acc = _load(acc_ref, _bounded((jnp.arange(maximum.size), None), (dims, form.head_dim)))
    out = (fade[:, None] * acc).sum(axis=0) / jnp.where(total > 0, total, 1.0)
    _store(out_ref, _bounded((dims, form.head_dim)), out)


def _prefill_kernel(
    qkv_ref,
    k_ref,
    v_ref,
    position_ref,
    row_ref,
    table_ref,
    *refs,
    form: _Form,
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
    heads = _bounded((inside, None), (member, form.group), (_dims(form), form.head_dim))
    q = _load(qkv_ref, heads).reshape(block * members, form.width)
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
    _store(out_ref, _bounded((token, count), (member, form.group), (_dims(form), form.head_dim)), out)


def _given(refs: tuple[Any, ...], given: tuple[bool, ...], member: jax.Array, form: _Form) -> Any:
    """Slopes and sinks, float32[members], and the refs of the scales of keys and values, each where it was given; and the
    refs that are left."""
    left = iter(refs)
    slopes, sinks, k_scales, v_scales = (next(left) if there else None for there in given)
    heads = _bounded((member, form.group))
    slopes, sinks = (None if x is None else _load(x, heads).astype(jnp.float32) for x in (slopes, sinks))
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


def _start(rows: int, form: _Form) -> Carry:
    """Nothing seen yet."""
    acc = jnp.zeros((rows, form.width), jnp.float32)
    return jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), acc


def _turn(carry: Carry, queries: _Queries, row: _Row, keys: jax.Array, form: _Form) -> Carry:
    """One block of a row's keys, at positions int32[S]."""
    maximum, total, acc = carry
    # The table ends within the last block, and behind the row's own pages may hold anything.
    index = row.number * form.table_width + jnp.minimum(keys // form.page_tokens, form.table_width - 1)
    page = jnp.clip(triton.load(row.table_ref.at[index]), 0, row.k_ref.shape[0] // form.page_tokens - 1)
    at = page * form.page_tokens + keys % form.page_tokens
    block = _bounded((at, None), (_dims(form), form.head_dim))
    scores = _dot(queries.q, _load(row.k_ref, block).astype(queries.q.dtype).T) * form.scale
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
    values = _load(row.v_ref, block).astype(queries.q.dtype)
    values = jnp.where((keys <= row.last)[:, None], values, jnp.zeros((), values.dtype))
    acc = acc * fade[:, None] + _dot(weights.astype(values.dtype), values)
    return highest, total, acc


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """[M, N] @ [N, O] in float32; float32 operands keep their precision."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _dims(form: _Form) -> jax.Array:
    return jnp.arange(form.width, dtype=jnp.int32)


def _bounded(*axes: tuple[jax.Array, int | None]) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
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


def _load(ref: Any, block: tuple[tuple[jax.Array, ...], jax.Array | None]) -> jax.Array:
    """A block, with zeros outside."""
    at, inside = block
    return triton.load(ref.at[at]) if inside is None else triton.load(ref.at[at], mask=inside, other=0)


def _store(ref: Any, block: tuple[tuple[jax.Array, ...], jax.Array | None], value: jax.Array) -> None:
    """What of the block is inside."""
    at, inside = block
    triton.store(ref.at[at], value.astype(ref.dtype), mask=inside)
