"""Paged attention on TPUs: Pallas kernels for decode and for packed prefill, which read no page that a row does not hold.

Everything else is plain XLA's, and so is attention over pools and tables that the kernels cannot read. Knows arrays,
no requests.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...models.attention import MASKED, XlaKernels, in_parts, on_devices, write
from ...models.kernels import KvLayer, PagedBatch
from ...sharding.mesh import Placement
from ..pages import pages_for
from .pallas_tpu_bodies import BLOCK_TOKENS, Form, blocks, decode_kernel, prefill_kernel
from .pallas_tpu_rows import LANE, WideRows

SUBLANES = 16
"""Page sizes are whole multiples: pages lie side by side in a block, on the borders of bfloat16's tiles. Those of int8 are whole
multiples of `LANE`, because the scales of a page lie along it."""
MOST_TABLE_BYTES = 2**19
"""The page table is read as scalars, from a memory that has room for this much of it."""
QUERY_ROWS = 512
"""Tokens times heads of one kv head that a prefill program computes: keys are read once for each such block."""


class PallasTpuKernels(XlaKernels):
    """`Kernels` for TPUs."""

    def __init__(self, placement: Placement | None = None, *, interpret: bool = False) -> None:
        """`placement` is how several devices are arranged; None for one. `interpret` runs on any platform, slowly."""
        super().__init__("tpu", placement)
        self._interpret = interpret

    name = "pallas"

    def kv_rows(self, kv_heads: int, head_dim: int) -> tuple[int, int]:
        """See `Kernels.kv_rows`: heads that are no whole tiles share rows."""
        rows = self._rows(kv_heads, head_dim)
        return rows.count, rows.width

    def page_tokens(self, most_tokens: int, rows: int) -> int:
        """See `Kernels.page_tokens`: a table of few, large pages fits where the kernels read it, however long the context."""
        size = LANE
        while _table_bytes(rows, pages_for(most_tokens, size)) > MOST_TABLE_BYTES and size < most_tokens:
            size *= 2
        return size

    def refusal(self, page_tokens: int, table: tuple[int, ...], kv_dtype: str) -> str:
        """See `Kernels.refusal`."""
        if kv_dtype == "int8" and page_tokens % LANE:
            return f"pages of {page_tokens} tokens in int8, not of a multiple of {LANE}"
        if page_tokens % SUBLANES or min(BLOCK_TOKENS % page_tokens, page_tokens % BLOCK_TOKENS):
            return (
                f"pages of {page_tokens} tokens, not of 16, 32, 64, 128, 256 or a multiple of {BLOCK_TOKENS}"
            )
        if _table_bytes(*table) > MOST_TABLE_BYTES:
            most = MOST_TABLE_BYTES // (4 * table[0]) * page_tokens
            return (
                f"a page table of {table[0]} rows is too large for contexts beyond {most} tokens (lower --max-total-tokens or "
                "raise --page-tokens)"
            )
        return ""

    def _rows(self, kv_heads: int, head_dim: int) -> WideRows:
        return WideRows(kv_heads, head_dim, 1 if self.placement is None else self.placement.model_size)

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
        if value_dim is not None:
            return super().attend(
                qkv, kv, batch, window=window, scale=scale, one_token_rows=one_token_rows, softcap=softcap,
                slopes=slopes, sinks=sinks, value_dim=value_dim,
            )  # fmt: skip
        _, kv_heads, members, head_dim = qkv.shape
        rows = self._rows(kv_heads, head_dim)
        by_head = (kv_heads, members - 2)
        with jax.ensure_compile_time_eval():
            slope = rows.by_row(jnp.array(slopes or np.zeros(by_head), jnp.float32).reshape(by_head))
        sink = None if sinks is None else rows.by_row(sinks.astype(jnp.float32))
        packed = rows.pack(qkv)
        if self.refusal(kv.k.shape[2], batch.table.shape, str(kv.k.dtype)):
            out, kv = super().attend(
                packed, kv, batch, window=window, scale=scale, one_token_rows=one_token_rows, softcap=softcap,
                slopes=slopes and tuple(np.asarray(slope).reshape(-1)), sinks=sink,
            )  # fmt: skip
            return rows.unpack(out), kv
        form = Form(scale, softcap, window, bool(slopes), kv.k.shape[2], batch.table.shape[1])
        out, kv = self._attend(packed, kv, batch, slope, sink, form, one_token_rows)
        return rows.unpack(out), kv

    def _attend(
        self,
        qkv: jax.Array,
        kv: KvLayer,
        batch: PagedBatch,
        slope: jax.Array,
        sink: jax.Array | None,
        form: Form,
        one_token_rows: int,
    ) -> tuple[jax.Array, KvLayer]:
        """`attend` with the kernels: qkv [T, K, G+2, H] as wide as the pool, slope and sink float32[K, G] -> [T, K G, H]."""
        tokens, _, members, width = qkv.shape
        group = members - 2
        kv = write(kv, qkv[:, :, group], qkv[:, :, group + 1], batch, self.placement)
        # A sink is a key already seen; one that weighs nothing stands where there is none.
        sink = jnp.full_like(slope, MASKED) if sink is None else sink
        decode, prefill = (
            on_devices(
                partial(compute, form=form, interpret=self._interpret),
                self.placement,
                table_by_token=table_by_token,
            )
            for compute, table_by_token in ((decode_attention, True), (prefill_attention, False))
        )
        parts = [
            attend(qkv[part, :, :group], kv, own, slope, sink)
            for attend, part, own in in_parts(batch, one_token_rows, decode, prefill)
        ]
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return out.reshape(tokens, -1, width), kv


def _table_bytes(rows: int, pages: int) -> int:
    return rows * pages * np.dtype(np.int32).itemsize


def decode_attention(
    q: jax.Array,
    kv: KvLayer,
    batch: PagedBatch,
    slope: jax.Array,
    sink: jax.Array,
    *,
    form: Form,
    interpret: bool = False,
) -> jax.Array:
    """q [T, K, G, H], slope and sink float32[K, G] -> [T, K, G, H]; row t of the table is query t's."""
    _, kv_heads, group, head_dim = q.shape
    first, last = blocks(batch.positions, batch.positions, form.window)
    turns = (last - first + 1).sum().reshape(1)
    smem, vmem, hbm = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pltpu.VMEM, pl.ANY))
    pools = _pools(kv)
    return pl.pallas_call(
        partial(decode_kernel, form=form),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        in_specs=[smem, smem, smem, vmem, vmem, vmem, (hbm,) * len(pools)],
        out_specs=vmem,
        scratch_shapes=[*_stream(pools, kv_heads), _sums(kv_heads, group, head_dim)],
        interpret=pltpu.InterpretParams() if interpret else False,
        name="xlane_decode_attention",
    )(
        turns, batch.positions, batch.table.reshape(-1), q, slope[..., None], sink[..., None], pools
    )  # fmt: skip


def prefill_attention(
    q: jax.Array,
    kv: KvLayer,
    batch: PagedBatch,
    slope: jax.Array,
    sink: jax.Array,
    *,
    form: Form,
    interpret: bool = False,
) -> jax.Array:
    """Tokens of several rows side by side: q [T, K, G, H], slope and sink float32[K, G] -> [T, K, G, H]."""
    tokens, kv_heads, group, head_dim = q.shape
    size = _query_tokens(group, tokens)
    more = -tokens % size
    # Heads lead, as in the pool: a head's queries are one matrix.
    queries = jnp.pad(q.transpose(1, 2, 0, 3), ((0, 0), (0, 0), (0, more), (0, 0)))
    positions, rows = jnp.pad(batch.positions, (0, more), constant_values=-1), jnp.pad(batch.rows, (0, more))
    scalars = (positions, rows, _piece_ends(positions, rows, size), batch.table.reshape(-1))
    block = pl.BlockSpec((None, group, size, head_dim), lambda k, t, *_: (k, 0, t, 0))
    of_head = pl.BlockSpec((None, group, 1, 1), lambda k, t, *_: (k, 0, 0, 0))
    pools = _pools(kv)
    out = pl.pallas_call(
        partial(prefill_kernel, form=form),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(kv_heads, (tokens + more) // size),
            in_specs=[block, of_head, of_head, (pl.BlockSpec(memory_space=pl.ANY),) * len(pools)],
            out_specs=block,
            scratch_shapes=[
                *_stream(pools, 1),
                pltpu.SMEM((1,), jnp.int32),
                _sums(group, size, head_dim),
            ],
        ),
        # One after the other: what a program computes with, the one before it has sent for.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="xlane_prefill_attention",
    )(*scalars, queries, slope[..., None, None], sink[..., None, None], pools)
    return out[:, :, :tokens].transpose(2, 0, 1, 3)


def _query_tokens(group: int, tokens: int) -> int:
    """Tokens of a prefill program: a power of two, whole tiles, and no more than there are."""
    most = min(QUERY_ROWS // group, pl.next_power_of_2(tokens))
    return max(SUBLANES, 1 << (max(most, 1).bit_length() - 1))


def _piece_ends(positions: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    """int32[T]: where the run of tokens of one row ends that each token is in. Padding is apart; so are blocks of `size`."""
    at = jnp.arange(rows.shape[0], dtype=jnp.int32)
    same = (rows[1:] == rows[:-1]) & ((positions[1:] < 0) == (positions[:-1] < 0)) & (at[1:] % size > 0)
    ends = jnp.append(jnp.where(same, at.size, at[1:]), jnp.int32(at.size))
    return jax.lax.cummin(ends, reverse=True)


def _pools(kv: KvLayer) -> tuple[jax.Array, ...]:
    """What there is of keys, values and the scales of both."""
    return tuple(pool for pool in kv if pool is not None)


def _stream(pools: tuple[jax.Array, ...], heads: int) -> list[Any]:
    """Two buffers of a block each for each pool, and what says that they are full."""
    buffers = tuple(pltpu.VMEM((2, heads, BLOCK_TOKENS, *pool.shape[3:]), pool.dtype) for pool in pools)
    return [buffers, pltpu.SemaphoreType.DMA((len(pools), 2))]


def _sums(*shape: int) -> tuple[Any, ...]:
    """Of online softmax: maximum and total float32[A, B, 1], weighted values float32[A, B, H]."""
    return tuple(pltpu.VMEM((*shape[:2], last), jnp.float32) for last in (1, 1, shape[2]))
