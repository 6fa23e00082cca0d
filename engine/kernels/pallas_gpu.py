"""Paged attention on NVIDIA GPUs: Pallas kernels for decode and for packed prefill.

They read no page that a row does not hold. Decode splits a row's keys over several programs, so that few rows fill the
device too, and a second kernel adds the parts up (split-K: Dao et al. 2023, "Flash-Decoding"). Matrix products are XLA's, but
for those of `pallas_gpu_linear.py`.
Lowered through Triton; `interpret` runs the same kernels anywhere. Knows arrays only, no requests.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ...models.attention import XlaKernels, in_parts, on_devices, write
from ...models.kernels import KvLayer, PagedBatch, Weight
from ...models.spec import Quantized
from ...sharding.mesh import Placement
from .pallas_gpu_bodies import PROGRAMS, Form, combine_kernel, decode_kernel, prefill_kernel
from .pallas_gpu_linear import linear, takes

DECODE_KEYS, PREFILL_KEYS = 64, 128
"""Keys looked at per turn of a loop, at most."""

QUERY_ROWS = 128
"""Queries times heads of one kv head that a prefill program computes, at most."""

TILE_BYTES = 2**15
"""Of queries, and of a block's keys: larger ones take minutes to compile and leave no room for a second block."""

MOST_SPLITS = 32

FLIGHT_BYTES = 2**17
"""Keys and values under way to one program at once. A multiprocessor has 227 KiB for them and the queries."""


class PallasGpuKernels(XlaKernels):
    """`Kernels` whose attention is the kernels of this file, and whose products of few rows with int8 weights are those of
    `pallas_gpu_linear.py`; the others are XLA's, and all of them where there are several devices."""

    name = "pallas"

    def __init__(self, placement: Placement | None = None, *, interpret: bool = False) -> None:
        """`placement` is how several devices are arranged; None for one. `interpret` runs on any platform, slowly."""
        super().__init__("gpu", placement)
        self._interpret = interpret

    def linear(self, x: jax.Array, weight: Weight, outputs: int) -> jax.Array:
        """See `Kernels.linear`."""
        if self.placement is not None or not isinstance(weight, Quantized) or not takes(x, weight):
            return super().linear(x, weight, outputs)
        rows = Quantized(weight.values.reshape(outputs, -1), weight.scales.reshape(outputs, 1))
        return linear(x, rows, interpret=self._interpret).astype(x.dtype)

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
        tokens, kv_heads, members, head_dim = qkv.shape
        group = members - 2
        kv = write(kv, qkv[:, :, group], qkv[:, :, group + 1], batch, self.placement)
        most = _tile_rows(head_dim, qkv.dtype)
        form = Form(scale, softcap, window, kv.k.shape[2], batch.table.shape[1], group, head_dim, most)
        slope = jnp.asarray(np.array(slopes, np.float32).reshape(kv_heads, group)) if slopes else None

        def attention(compute: Any, keys: int, *, table_by_token: bool) -> Any:
            tiled = form._replace(keys=min(keys, most))
            return on_devices(
                partial(compute, form=tiled, interpret=self._interpret),
                self.placement,
                table_by_token=table_by_token,
            )

        decode = attention(decode_attention, DECODE_KEYS, table_by_token=True)
        prefill = attention(prefill_attention, PREFILL_KEYS, table_by_token=False)
        parts = [
            attend(qkv[part], kv, own, slope, sinks)
            for attend, part, own in in_parts(batch, one_token_rows, decode, prefill)
        ]
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return out.reshape(tokens, kv_heads * group, head_dim), kv


def decode_attention(
    qkv: jax.Array,
    kv: KvLayer,
    batch: PagedBatch,
    slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    form: Form,
    interpret: bool,
) -> jax.Array:
    """One query a row: qkv [T, K, G+2, H], slopes and sinks [K, G] or None -> [T, K, G, H] in its type."""
    rows, kv_heads = qkv.shape[:2]
    splits = _splits(rows * kv_heads, form.table_width * form.page_tokens // form.keys)
    given, by_head = _per_head(slopes, sinks, kv)
    part = jax.ShapeDtypeStruct((splits, rows, kv_heads, form.group), jnp.float32)
    parts = pl.pallas_call(
        partial(decode_kernel, form=form, splits=splits, given=by_head),
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
        partial(combine_kernel, form=form),
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
    form: Form,
    interpret: bool,
) -> jax.Array:
    """Tokens of several rows side by side: qkv [T, K, G+2, H], slopes and sinks [K, G] or None -> [T, K, G, H] in its type."""
    tokens, kv_heads = qkv.shape[:2]
    members = pl.next_power_of_2(form.group)
    block = max(1, min(QUERY_ROWS, _tile_rows(form.head_dim, qkv.dtype)) // members)
    given, by_head = _per_head(slopes, sinks, kv)
    whole_tokens = pl.BlockSpec((tokens,), lambda k, t: (0,))
    return pl.pallas_call(
        partial(prefill_kernel, form=form, block=block, members=members, given=by_head),
        # Heads first: what starts together is of the same tokens, and takes as long.
        grid=(kv_heads, pl.cdiv(tokens, block)),
        in_specs=[
            pl.BlockSpec((tokens, None, *qkv.shape[2:]), lambda k, t: (0, k, 0, 0)),
            *[pl.BlockSpec((None, *_flat(kv.k).shape[1:]), lambda k, t: (k, 0, 0))] * 2,
            whole_tokens,
            whole_tokens,
            pl.BlockSpec((batch.table.size,), lambda k, t: (0,)),
            *[pl.BlockSpec((None, x.shape[1]), lambda k, t: (k, 0)) for x in given],
        ],
        out_specs=pl.BlockSpec((tokens, None, form.group, form.head_dim), lambda k, t: (0, k, 0, 0)),
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


def _tuned(qkv: jax.Array, form: Form, warps: int) -> triton.CompilerParams:
    """As many blocks under way as there is room for."""
    block_bytes = 2 * form.keys * form.width * qkv.dtype.itemsize
    return triton.CompilerParams(num_warps=warps, num_stages=max(1, min(4, FLIGHT_BYTES // block_bytes)))


def _flat(pool: jax.Array | None) -> jax.Array:
    """[K, P, W, H] seen as [K, P W, H]."""
    assert pool is not None, "values in latent form are XLA's"
    return pool.reshape(pool.shape[0], -1, pool.shape[-1])


def _per_head(
    slopes: jax.Array | None, sinks: jax.Array | None, kv: KvLayer
) -> tuple[list[jax.Array], tuple[bool, ...]]:
    """What there is that has a row [K, …] for each kv head, and which of the four that is."""
    scales = [None if x is None else x.reshape(x.shape[0], -1) for x in (kv.k_scales, kv.v_scales)]
    there = [slopes, sinks, *scales]
    return [x for x in there if x is not None], tuple(x is not None for x in there)
