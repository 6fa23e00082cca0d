"""Decode attention for TPUs: one Pallas kernel a layer that walks over the pages which rows hold, and no others.

One loop goes over all blocks of all rows. While one block is computed the next one's pages travel from HBM, across the
border between rows too, so the memory never rests. Everything else is plain XLA's. Knows arrays, no requests.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...models.attention import MASKED, XlaKernels, write
from ...models.kernels import KvLayer, PagedBatch
from ...sharding.mesh import Placement

BLOCK_TOKENS = 256
"""Keys of a turn: large enough that a transfer outlasts its start, small enough to waste little at a row's end."""
LANE = 128
"""Head sizes are whole multiples: otherwise a pool is not laid out in the order that the kernel reads."""
SUBLANES = 16
"""Page sizes are whole multiples: pages lie side by side in a block, on the borders of bfloat16's tiles."""
MOST_TABLE_BYTES = 2**19
"""The page table is read as scalars, from a memory that has room for this much of it."""


class PallasTpuKernels(XlaKernels):
    """`Kernels` for TPUs."""

    def __init__(self, placement: Placement | None = None, *, interpret: bool = False) -> None:
        """`placement` is how several devices are arranged; None for one. `interpret` runs on any platform, slowly."""
        super().__init__("tpu", placement)
        self._interpret = interpret

    name = "pallas"

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
        few_bits = kv.k_scales is not None
        plain = one_token_rows != tokens or few_bits or value_dim is not None
        if plain or not fits(head_dim, kv.k.shape[2], batch.table.shape):
            return super().attend(
                qkv, kv, batch, window=window, scale=scale, one_token_rows=one_token_rows, softcap=softcap,
                slopes=slopes, sinks=sinks, value_dim=value_dim,
            )  # fmt: skip
        group = members - 2
        kv = write(kv, qkv[:, :, group], qkv[:, :, group + 1], batch, self.placement)
        by_head = (kv_heads, group)
        slope = jnp.asarray(np.array(slopes or np.zeros(by_head), np.float32).reshape(by_head))
        # A sink is a key already seen; one that weighs nothing stands where there is none.
        sink = jnp.full(by_head, MASKED, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
        attend = partial(
            decode_attention, form=_Form(scale, softcap, window, bool(slopes)), interpret=self._interpret
        )
        out = self._spread(attend)(qkv[:, :, :group], kv, batch, slope, sink)
        return out.reshape(tokens, kv_heads * group, head_dim), kv

    def _spread(self, attend: Any) -> Any:
        """Each device attends with the kv heads, and the rows, that lie there."""
        if self.placement is None:
            return attend
        axes = (("kv_heads",), ("tokens",), ("tokens", "kv_heads", None, None))
        specs: list[Any] = [self.placement.sharding(each).spec for each in axes]
        heads, rows, queries = specs
        inputs = (queries, KvLayer(heads, heads), PagedBatch(rows, rows, rows), heads, heads)
        return jax.shard_map(
            attend, mesh=self.placement.mesh, in_specs=inputs, out_specs=queries, check_vma=False
        )


class _Form(NamedTuple):
    """What is the same for all launches of a layer."""

    scale: float
    softcap: float | None
    window: int | None
    sloped: bool


def fits(head_dim: int, page_tokens: int, table: tuple[int, ...]) -> bool:
    """Can the kernel work on such a pool and table [R, Pmax]? Plain XLA can on any."""
    return (
        head_dim % LANE == 0
        and page_tokens % SUBLANES == 0
        and BLOCK_TOKENS % page_tokens == 0
        and 4 * table[0] * table[1] <= MOST_TABLE_BYTES
    )


def decode_attention(
    q: jax.Array,
    kv: KvLayer,
    batch: PagedBatch,
    slope: jax.Array,
    sink: jax.Array,
    *,
    form: _Form,
    interpret: bool = False,
) -> jax.Array:
    """q [T, K, G, H], slope and sink float32[K, G] -> [T, K, G, H]; row t of the table is query t's."""
    _, kv_heads, group, head_dim = q.shape
    pool = kv.k
    block = (kv_heads, BLOCK_TOKENS, head_dim)
    first, last = _blocks(batch.positions, form.window)
    turns = (last - first + 1).sum().reshape(1)
    smem, vmem, hbm = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pltpu.VMEM, pl.ANY))
    sums = pltpu.VMEM((kv_heads, group, 1), jnp.float32)
    return pl.pallas_call(
        partial(_kernel, form=form, page_tokens=pool.shape[2], table_width=batch.table.shape[1]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        in_specs=[smem, smem, smem, vmem, vmem, vmem, hbm, hbm],
        out_specs=vmem,
        scratch_shapes=[
            pltpu.VMEM((2, *block), pool.dtype),
            pltpu.VMEM((2, *block), pool.dtype),
            pltpu.SemaphoreType.DMA((2, 2)),
            sums,
            sums,
            pltpu.VMEM((kv_heads, group, head_dim), jnp.float32),
        ],
        interpret=pltpu.InterpretParams() if interpret else False,
        name="xlane_decode_attention",
    )(
        turns, batch.positions, batch.table.reshape(-1), q, slope[..., None], sink[..., None], kv.k, kv.v
    )  # fmt: skip


def _blocks(position: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first and last block that a query at `position` sees; padding, at -1, has one of which it sees nothing."""

    def block(at: jax.Array) -> jax.Array:
        # Not `//`: of numbers below 0, which there are none, it would need to know the very chip.
        return jax.lax.div(jnp.maximum(at, 0), jnp.int32(BLOCK_TOKENS))

    last = block(position)
    return (jnp.zeros_like(last) if window is None else block(position - window + 1)), last


def _kernel(*refs: Any, form: _Form, page_tokens: int, table_width: int) -> None:
    """The number of turns int32[1], the positions int32[T] and the flat table are scalars; the pools stay in HBM. Two buffers
    of a block each take turns."""
    turns, positions, table, q, slope, sink, k_pool, v_pool, out, *scratch = refs
    k_buffer, v_buffer, arrived, maximum, total, acc = scratch
    rows = positions.shape[0]
    pages = BLOCK_TOKENS // page_tokens

    def transfer(row: jax.Array, block: jax.Array, slot: jax.Array, act: str) -> None:
        """Begin or await the pages of a block; those behind the row's last token are left out."""
        for index in range(pages):
            number = block * pages + index

            @pl.when(number * page_tokens <= positions[row])
            def _(index: int = index, number: jax.Array = number):
                page = table[row * table_width + number]
                place = pl.ds(index * page_tokens, page_tokens)
                for which, (pool, buffer) in enumerate(((k_pool, k_buffer), (v_pool, v_buffer))):
                    copy = pltpu.make_async_copy(
                        pool.at[:, page], buffer.at[slot, :, place], arrived.at[which, slot]
                    )
                    getattr(copy, act)()

    def turn(count: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, block = at
        slot = jax.lax.rem(count, 2)
        position = positions[row]
        first, last = _blocks(position, form.window)
        following = jnp.minimum(row + 1, rows - 1)
        ends = block == last
        next_row = jnp.where(ends, following, row)
        next_block = jnp.where(ends, _blocks(positions[following], form.window)[0], block + 1)

        @pl.when(count + 1 < turns[0])
        def _():
            transfer(next_row, next_block, 1 - slot, "start")

        transfer(row, block, slot, "wait")

        @pl.when(block == first)
        def _():
            maximum[...] = sink[...]
            total[...] = jnp.where(sink[...] > MASKED, 1.0, 0.0)
            acc[...] = jnp.zeros_like(acc)

        _accumulate(q[row], k_buffer[slot], v_buffer[slot], slope[...], position, block, maximum, total, acc, form)  # fmt: skip

        @pl.when(ends)
        def _():
            out[row] = (acc[...] / jnp.where(total[...] > 0, total[...], 1.0)).astype(out.dtype)

        return next_row, next_block

    start = jnp.int32(0), _blocks(positions[0], form.window)[0]
    transfer(*start, jnp.int32(0), "start")
    jax.lax.fori_loop(0, turns[0], turn, start)


def _accumulate(q, k, v, slope, position, block, maximum, total, acc, form: _Form) -> None:
    """One block of online softmax. q [K, G, H], k and v [K, S, H], sums in `maximum`, `total` [K, G, 1] and `acc` [K, G, H]."""
    f32 = jnp.float32
    scores = jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=f32) * form.scale
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    key = block * BLOCK_TOKENS + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    if form.sloped:
        scores = scores + slope * (key - position).astype(f32)
    seen = key <= position
    if form.window is not None:
        seen &= key > position - form.window
    scores = jnp.where(seen, scores, MASKED)
    highest = jnp.maximum(maximum[...], scores.max(axis=2, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - highest), 0.0)
    fade = jnp.exp(maximum[...] - highest)
    # What lies behind a row's last token is nobody's or another's: a weight of 0 does not silence a NaN.
    held = block * BLOCK_TOKENS + jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) <= position
    values = jnp.where(held, v, jnp.zeros_like(v))
    sums = jax.lax.dot_general(
        weights.astype(v.dtype), values, (((2,), (1,)), ((0,), (0,))), preferred_element_type=f32
    )
    acc[...] = acc[...] * fade + sums
    total[...] = total[...] * fade + weights.sum(axis=2, keepdims=True)
    maximum[...] = highest
