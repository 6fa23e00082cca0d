"""What lives on the device between launches: the lanes' state and the KV pool, both donated to every launch.

Knows shapes, types and placement; not what a launch does with them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models.attention import kv_axis
from ..models.config import ModelConfig
from ..models.kernels import KvLayer
from ..sharding.mesh import Placement
from .request import MAX_LOGIT_BIAS
from .sampler import SamplingRows

SCALE_BYTES = 4
"""Of a scale of int8 keys or values, float32."""
MAX_STOP_IDS = 32
"""Stop tokens a lane can hold."""


class LaneState(NamedTuple):
    """One row per lane, B rows. DONATED: a launch consumes it and returns the next."""

    token: jax.Array
    """int32[B]: the newest token, not yet in the KV pool."""
    position: jax.Array
    """int32[B]: where `token` goes, that is, how many tokens of the lane are in the pool."""
    remaining: jax.Array
    """int32[B]: tokens the lane may still generate."""
    active: jax.Array
    """bool[B]: decode this lane. Switched off on the device by a stop token or an empty budget, so that a launch made
    before the host has seen the end does no harm."""
    table: jax.Array
    """int32[B, Pmax]: page ids in order of position."""
    seen: jax.Array
    """int32[B, V]: what occurred, see `sampler.IN_PROMPT`."""
    sampling: SamplingRows
    adapter: jax.Array | None = None
    """int32[B]: the lane's adapter, from 1 up, 0 for none; None where there are no adapters."""


class Shapes(NamedTuple):
    """The sizes every program is compiled for."""

    lanes: int
    pages: int
    page_tokens: int
    table_width: int
    """Pages of the longest request allowed."""
    vocab: int
    kv_rows: tuple[int, int] | None = None
    """How a token's keys lie in the pool (`Kernels.kv_rows`); None: a row of its own for each kv head."""


def page_bytes(
    config: ModelConfig, page_tokens: int, dtype: str, kv_rows: tuple[int, int] | None = None
) -> int:
    """Bytes of one page in all layers, keys and values, of int8 with their scales; in latent form keys alone."""
    rows, width = kv_rows or (config.kv_heads, config.head_dim)
    vector = width * jnp.dtype(dtype).itemsize + (SCALE_BYTES if dtype == "int8" else 0)
    return (1 if config.latent else 2) * config.layers * rows * page_tokens * vector


def described(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> Any:
    """A description that stands where an array will; typed as anything, because the tuples name arrays."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def abstract_state(shapes: Shapes, placement: Placement, *, adapters: bool = False) -> LaneState:
    """Shapes, types and placement of the lane state: a whole copy on every device, but `seen` split over vocabulary."""
    b = shapes.lanes

    def leaf(dtype: Any, *shape: int) -> Any:
        return described((b, *shape), dtype, placement.replicated)

    i32, f32 = jnp.int32, jnp.float32
    seen = placement.fitted((None, "vocab"), (b, shapes.vocab))
    return LaneState(
        token=leaf(i32),
        position=leaf(i32),
        remaining=leaf(i32),
        active=leaf(jnp.bool_),
        table=leaf(i32, shapes.table_width),
        seen=described((b, shapes.vocab), i32, seen),
        sampling=SamplingRows(
            temperature=leaf(f32),
            top_k=leaf(i32),
            top_p=leaf(f32),
            min_p=leaf(f32),
            typical_p=leaf(f32),
            repetition=leaf(f32),
            frequency=leaf(f32),
            presence=leaf(f32),
            seed=leaf(jnp.uint32, 2),
            logprobs=leaf(i32),
            top_n=leaf(i32),
            bias_ids=leaf(i32, MAX_LOGIT_BIAS),
            bias=leaf(f32, MAX_LOGIT_BIAS),
            stop=leaf(i32, MAX_STOP_IDS),
            stop_from=leaf(i32),
            watermark=leaf(i32),
        ),
        adapter=leaf(i32) if adapters else None,
    )


def abstract_kv(config: ModelConfig, shapes: Shapes, dtype: str, placement: Placement) -> tuple[KvLayer, ...]:
    """Shapes, types and placement of the pool, one entry a layer: head-major, what paged kernels of all platforms take, and
    what shards over heads. int8 has its scales beside it. In latent form every device has the whole of it."""
    rows, width = shapes.kv_rows or (config.kv_heads, config.head_dim)
    shape = (rows, shapes.pages, shapes.page_tokens, width)
    axes = (kv_axis(latent=config.latent is not None), None, None, None)
    pool = described(shape, dtype, placement.sharding(axes))
    scales = described(shape[:3], jnp.float32, placement.sharding(axes[:3])) if dtype == "int8" else None
    layer = KvLayer(pool, None, scales) if config.latent else KvLayer(pool, pool, scales, scales)
    return (layer,) * config.layers


def held_bytes(abstract: Any) -> int:
    """Bytes a described tree takes on all its devices together, copies counted."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize * a.sharding.num_devices
        for a in jax.tree.leaves(abstract)
    )


def zeros_like(abstract):
    """Allocate a tree of zeros where its description says, on the device, in one launch."""
    make = jax.jit(
        lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract),
        out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
    )
    return make()
