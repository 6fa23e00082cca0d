"""What a decoder needs computed by somebody who knows the platform: matmul with stored weights, paged attention, rows.

The plain-XLA versions are in `attention.py` and `rowwise.py`; native and Pallas ones are handed in by the engine. A kernel
knows arrays only, not which request a row belongs to.
"""

from typing import NamedTuple, Protocol

import jax

from ..sharding.mesh import Placement
from .config import Activation
from .spec import Quantized

Weight = jax.Array | Quantized[jax.Array]
"""A stored weight."""


class PagedBatch(NamedTuple):
    """Where the T tokens of one launch stand. A pytree of int32 arrays."""

    positions: jax.Array
    """int32[T]: position of each token in its sequence; -1 marks padding, which writes nothing and may return anything
    finite."""
    rows: jax.Array
    """int32[T]: the row of `table` each token belongs to. Tokens of one row are adjacent, each a position behind the one
    before it."""
    table: jax.Array
    """int32[R, Pmax]: page ids of each row in order of position. Pages beyond a row's tokens may hold anything."""


class KvLayer(NamedTuple):
    """The KV pool of one layer."""

    k: jax.Array
    """[K, P, W, H]; see `Kernels.kv_rows`."""
    v: jax.Array | None
    """[K, P, W, H]; None where values are a part of the keys (`Kernels.attend`)."""
    k_scales: jax.Array | None = None
    """float32[K, P, W], where keys and values are int8: what each token's are to be multiplied with, head by head."""
    v_scales: jax.Array | None = None


class Kernels(Protocol):
    """One platform's way to compute. Pure functions of arrays; called while tracing."""

    @property
    def name(self) -> str:
        """Shown to the user: which implementation."""
        ...

    @property
    def packed(self) -> bool:
        """Weights are stored as panels (see `spec.pack`)."""
        ...

    def kv_rows(self, kv_heads: int, head_dim: int) -> tuple[int, int]:
        """How a token's keys, and its values, lie in the pool that `attend` takes: the number of rows K and their width H. A
        row is a head unless a platform wants wider ones."""
        ...

    def page_tokens(self, most_tokens: int, rows: int) -> int:
        """Tokens of a page, where nobody asks for others: requests of up to `most_tokens`, in tables of so many rows."""
        ...

    def refusal(self, page_tokens: int, table: tuple[int, ...], kv_dtype: str) -> str:
        """Why `attend` leaves such pages and such a table [R, Pmax] to plain XLA; empty where it does not."""
        ...

    def linear(self, x: jax.Array, weight: Weight, outputs: int) -> jax.Array:
        """x [T, D] times a stored weight -> [T, outputs], accumulated in float32, in x's dtype."""
        ...

    @property
    def placement(self) -> Placement | None:
        """How devices are arranged, where they are several."""
        ...

    def grouped_linear(self, x: jax.Array, weight: Weight, sizes: jax.Array, outputs: int) -> jax.Array:
        """Rows x [S, D] in groups behind each other, `sizes` int32[X] of them, each group times a stored weight of its own,
        [X, …, D] in all -> [S, outputs] as `linear` does; rows behind the last group may give anything finite."""
        ...

    def rms_norm(self, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
        """See `rowwise.rms_norm`; `scale` has as many axes as x."""
        ...

    def gated(self, both: jax.Array, activation: Activation) -> jax.Array:
        """See `rowwise.gated`: [T, 2, F] -> [T, F]."""
        ...

    def argmax(self, x: jax.Array) -> jax.Array:
        """See `rowwise.argmax`: float32[R, V] -> int32[R], V where there is a NaN."""
        ...

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
        """Write keys and values into the pages of their rows, then attend the queries causally -> [T, N, H].

        qkv [T, K, G+2, H] holds, per kv head, its G query heads, its key and its value. With `value_dim` it holds no value,
        [T, K, G+1, H], nor does the pool: a value is the first so many numbers of its key, and the result [T, N, value_dim].

        A query at position p sees the keys of its row at positions max(0, p - window + 1) … p, those written by this
        very call included. Of the first `one_token_rows` tokens each has a row of the table by its own number, row t token t
        (lanes that decode); where a lane has several there, `rows` names the first one's. Query head n reads kv head
        n // G. The pool arrays are consumed.

        A score s, scaled, becomes softcap tanh(s / softcap); then `slopes` (one a query head) times the distance to the
        key is taken off. `sinks` [K, G] are scores of nothing: they take part in the softmax and add no value.
        """
        ...


class AnyPool:
    """What kernels have in common that take the pool as the model has it, a row for each head, whatever its sizes."""

    __slots__ = ()

    def kv_rows(self, kv_heads: int, head_dim: int) -> tuple[int, int]:
        """See `Kernels.kv_rows`."""
        return kv_heads, head_dim

    def page_tokens(self, most_tokens: int, rows: int) -> int:
        """See `Kernels.page_tokens`: small ones, which waste little and share much."""
        return 32

    def refusal(self, page_tokens: int, table: tuple[int, ...], kv_dtype: str) -> str:
        """See `Kernels.refusal`: nothing is."""
        return ""
