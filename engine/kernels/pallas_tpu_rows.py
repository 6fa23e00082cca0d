"""Heads that are no whole number of tiles wide: how several of them share a row of the pool, and how they are attended there.

A TPU's tile is 128 numbers wide. Rows of 64 would lie in memory in an order that no kernel reads, or filled up to twice their
size; two heads side by side fill a row. A query of the one has zeros where the other's key lies, which costs nothing: the
matrix unit is 128 wide, too. Knows arrays, no platform.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

LANE = 128
"""Rows are whole multiples."""


@dataclass(frozen=True, slots=True)
class WideRows:
    """kv heads of one size, in rows of the pool. What fills up the last row and its end is zero."""

    heads: int
    """kv heads."""
    head_dim: int
    split: int
    """Devices that the heads are split over. No row is."""

    @property
    def shared(self) -> int:
        """Heads of a row."""
        return max(1, min(LANE // self.head_dim, self.heads // self.split))

    @property
    def count(self) -> int:
        """Rows, on all devices."""
        return self.split * -(-self.heads // self.split // self.shared)

    @property
    def width(self) -> int:
        """Of a row."""
        return -(-self.shared * self.head_dim // LANE) * LANE

    def pack(self, qkv: jax.Array) -> jax.Array:
        """[T, K, G+2, H] -> [T, count, shared G + 2, width]: queries with zeros beside them, and whole rows of keys and values."""
        if self._plain:
            return qkv
        tokens, _, members, _ = qkv.shape
        by_row = self._filled(qkv, 1)
        q, kv = by_row[..., : members - 2, :], by_row[..., members - 2 :, :]
        q = jnp.where(self._own, q[..., None, :], jnp.zeros((), q.dtype)).reshape(
            tokens, self.count, -1, self.shared * self.head_dim
        )
        kv = kv.swapaxes(2, 3).reshape(tokens, self.count, 2, -1)
        packed = jnp.concatenate([q, kv], axis=2)
        return jnp.pad(packed, ((0, 0), (0, 0), (0, 0), (0, self.width - packed.shape[3])))

    def unpack(self, out: jax.Array) -> jax.Array:
        """[T, count shared G, width], what was attended -> [T, K G, H]: of each query its own head's values."""
        if self._plain:
            return out
        tokens = out.shape[0]
        values = out[..., : self.shared * self.head_dim]
        values = values.reshape(tokens, self.count, self.shared, -1, self.shared, self.head_dim)
        values = jnp.where(self._own, values, jnp.zeros((), out.dtype)).sum(axis=4)
        values = values.reshape(tokens, self.split, -1, values.shape[3], self.head_dim)
        return values[:, :, : self.heads // self.split].reshape(tokens, -1, self.head_dim)

    def by_row(self, of_heads: jax.Array) -> jax.Array:
        """[K, G], a number for each query head -> [count, shared G]."""
        return of_heads if self._plain else self._filled(of_heads, 0).reshape(self.count, -1)

    @property
    def _own(self) -> np.ndarray:
        """bool[1, 1, shared, 1, shared, 1]: where in a row each of its heads lies."""
        return np.eye(self.shared, dtype=bool)[None, None, :, None, :, None]

    @property
    def _plain(self) -> bool:
        return (self.count, self.width) == (self.heads, self.head_dim)

    def _filled(self, x: jax.Array, axis: int) -> jax.Array:
        """[…, K, …] -> […, count, shared, …], with zeros for heads that a device's last row lacks."""
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        here = self.heads // self.split
        x = x.reshape(*before, self.split, here, *after)
        lacking = np.zeros((x.ndim, 2), int)
        lacking[axis + 1, 1] = self.count // self.split * self.shared - here
        return jnp.pad(x, lacking).reshape(*before, self.count, self.shared, *after)
