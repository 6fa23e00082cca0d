"""Pages between the device and the host: what an engine keeps of its prefix cache when it ends, and takes back in.

Compiled before the engine is ready, like all it runs. Knows the pool and the weights; not files, nor what pages mean.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .state import abstract_kv, described
from .step import Blueprint, Kv, Params

GROUP_PAGES = 16
"""Pages of one launch."""


class Recall:
    """Copies groups of pages out of the pool and into it."""

    def __init__(self, blueprint: Blueprint) -> None:
        b = blueprint
        self._pages = b.shapes.pages
        self._placement = b.placement
        kv = abstract_kv(b.config, b.shapes, b.kv_dtype, b.placement)
        self._kinds = [np.dtype(pool.dtype) for pool in jax.tree.leaves(kv)]
        self._shapes = [(pool.shape[0], *pool.shape[2:]) for pool in jax.tree.leaves(kv)]
        """Of one page of each pool: [K, W, H]."""
        sizes = [math.prod(shape) * kind.itemsize for shape, kind in zip(self._shapes, self._kinds)]
        self._ends = list(itertools.accumulate(sizes))
        self.page_bytes = self._ends[-1]
        """Of one page in all layers, keys and values."""
        replicated = b.placement.replicated
        ids = described((GROUP_PAGES,), jnp.int32, replicated)
        group = [
            described((GROUP_PAGES, *shape), kind, replicated)
            for shape, kind in zip(self._shapes, self._kinds)
        ]
        self._copy_out = jax.jit(_copy_out, out_shardings=replicated).lower(kv, ids).compile()
        copy_in = jax.jit(
            _copy_in, donate_argnums=0, out_shardings=jax.tree.map(lambda pool: pool.sharding, kv)
        )
        self._copy_in = copy_in.lower(kv, ids, group).compile()

    def copy_out(self, kv: Kv, pages: Sequence[int]) -> Iterator[np.ndarray]:
        """The bytes of pages, in groups uint8[some, page_bytes]."""
        for at in range(0, len(pages), GROUP_PAGES):
            part = pages[at : at + GROUP_PAGES]
            made = self._copy_out(kv, self._ids(part))
            bytes_of = [np.asarray(pool).reshape(GROUP_PAGES, -1).view(np.uint8) for pool in made]
            yield np.concatenate(bytes_of, axis=1)[: len(part)]

    def copy_in(self, kv: Kv, pages: Sequence[int], content: np.ndarray) -> Kv:
        """CONSUMES the pool; returns it with uint8[n, page_bytes] in those pages."""
        for at in range(0, len(pages), GROUP_PAGES):
            part = pages[at : at + GROUP_PAGES]
            group = np.zeros((GROUP_PAGES, self.page_bytes), np.uint8)
            group[: len(part)] = content[at : at + GROUP_PAGES]
            pools = [
                self._placement.put(np.ascontiguousarray(columns).view(kind).reshape(GROUP_PAGES, *shape))
                for columns, kind, shape in zip(
                    np.split(group, self._ends[:-1], axis=1), self._kinds, self._shapes
                )
            ]
            kv = self._copy_in(kv, self._ids(part), pools)
        return kv

    def _ids(self, pages: Sequence[int]) -> jax.Array:
        """Padded with the page after the last, which is written nowhere."""
        ids = np.full(GROUP_PAGES, self._pages, np.int32)
        ids[: len(pages)] = pages
        return self._placement.put(ids)


def _copy_out(kv: Kv, ids: jax.Array) -> list[jax.Array]:
    """Pools [K, P, W, H], int32[R] -> of each pool [R, K, W, H]."""
    return [pool.at[:, ids].get(mode="clip").swapaxes(0, 1) for pool in jax.tree.leaves(kv)]


def _copy_in(kv: Kv, ids: jax.Array, pages: list[jax.Array]) -> Kv:
    """The inverse of `_copy_out`."""
    pools, tree = jax.tree.flatten(kv)
    put = [pool.at[:, ids].set(new.swapaxes(0, 1), mode="drop") for pool, new in zip(pools, pages)]
    return jax.tree.unflatten(tree, put)


def weights_digest(params: Params) -> str:
    """Tells weights apart: for each array the sum of its numbers' hashes, whichever way they are spread over devices."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

    def add(array: Any) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(array, kinds[array.dtype.itemsize])
        # Hashed one by one: in a plain sum of bits a change of all signs would cancel out.
        mixed = bits.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    sums = np.array(
        [
            np.asarray(total)
            for total in jax.jit(lambda arrays: [add(x) for x in arrays])(jax.tree.leaves(params))
        ]
    )
    return hashlib.blake2b(sums.astype("<u4").tobytes(), digest_size=16).hexdigest()
