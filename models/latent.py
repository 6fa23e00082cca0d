"""Attention whose keys and values are made of one vector a token, and which keeps that vector alone (`config.Latent`).

A head's keys and values are never made: its queries are brought into the vector's space, and what they bring back from
there is taken into the head's. What a step reads of the context is the same few numbers a token for all heads. Knows no
pages and no kernels, and not what the decoder adds the result to.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from .config import Latent, ModelConfig
from .kernels import Kernels, KvLayer
from .modules import Linear, Style, param
from .norms import RmsNorm
from .rope import rotate

Attend = Callable[[jax.Array], tuple[jax.Array, KvLayer]]
"""Queries, keys and perhaps values [T, K, …, H] -> what each query head brings back, [T, N, …], and the new KV."""


class LatentAttention(nnx.Module):
    """x [T, D] -> each head's value, [T, N * `value`]; the projection back is the layer's."""

    def __init__(self, config: ModelConfig, latent: Latent, style: Style) -> None:
        c, m = config, latent
        self.config, self.shape = config, latent
        query = (c.heads, m.still + m.rotary, m.query_rank or c.hidden_size)
        if m.query_rank:
            self.q_down = Linear((m.query_rank, c.hidden_size), (None, None), c.qkv_bias, style)
            self.q_norm = RmsNorm((m.query_rank,), m.norm_eps, False, style)
        self.q = Linear(query, ("heads", None, None), False, style)
        self.down = Linear((m.rank + m.rotary, c.hidden_size), (None, None), c.qkv_bias, style)
        self.norm = RmsNorm((m.rank,), m.norm_eps, False, style)
        # In full: it is read along either axis, and is small.
        self.up = param((c.heads, m.still + m.value, m.rank), ("heads", None, None), style.dtype)

    def __call__(
        self,
        x: jax.Array,
        attend: Attend,
        turning: tuple[jax.Array, ...],
        kernels: Kernels,
        adapters: jax.Array | None,
    ) -> tuple[jax.Array, KvLayer]:
        """`turning`: cos and sin float32[T, 1, rotary]. -> the heads' values, and this layer's new KV."""
        m, tokens = self.shape, x.shape[0]
        q = self.q(self._queried(x, kernels, adapters), kernels, adapters)
        q = q.reshape(tokens, self.config.heads, m.still + m.rotary)
        down = self.down(x, kernels, adapters)
        vector, shared = self.norm(down[:, : m.rank], kernels), down[:, m.rank :]
        turned = rotate(jnp.concatenate([q[:, :, m.still :], shared[:, None]], axis=1), turning, self.config)
        to_keys, to_values = self.up[:, : m.still], self.up[:, m.still :]
        into = jnp.einsum("tns,nsr->tnr", q[:, :, : m.still], to_keys, preferred_element_type=jnp.float32)
        heads = jnp.concatenate([into.astype(x.dtype), vector[:, None]], axis=1)
        found, kv = attend(jnp.concatenate([heads, turned], axis=2)[:, None])
        back = jnp.einsum("tnr,nvr->tnv", found, to_values, preferred_element_type=jnp.float32)
        return back.astype(x.dtype).reshape(tokens, -1), kv

    def _queried(self, x: jax.Array, kernels: Kernels, adapters: jax.Array | None) -> jax.Array:
        """What queries are made of."""
        return self.q_norm(self.q_down(x, kernels, adapters), kernels) if self.shape.query_rank else x
