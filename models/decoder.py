"""One decoder for all families: embed, layers of attention and feed-forward, norm, logits. Flax NNX modules.

Modules describe the network and its parameters. They are split once, at start, into a flat tuple of arrays
(`DecoderGraph`) and merged again only while tracing: no module ever enters a compiled call. Pure in (parameters, tokens,
positions, KV). Knows nothing of lanes, sampling or where kernels come from.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding.axes import Constrain
from .attention import default_scale
from .config import ModelConfig
from .kernels import Kernels, KvLayer, PagedBatch
from .rope import rotate, rotation
from .spec import PANEL, ParamSpec


def _param(
    shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str, packed: bool = False
) -> nnx.Param:
    """A parameter that carries its own description. Built under `nnx.eval_shape`, so nothing is allocated."""
    spec = ParamSpec("", shape, dtype, axes, packed)
    return nnx.Param(jnp.zeros(spec.stored_shape, dtype), spec=spec)


@dataclass(frozen=True, slots=True)
class _Style:
    """How parameters are stored."""

    dtype: str
    packed: bool


class Linear(nnx.Module):
    """y = x W^T + b. The weight's last axis is contracted; its other axes are the outputs."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], bias: bool, style: _Style
    ) -> None:
        self.outputs = math.prod(shape[:-1])
        self.weight = _param(shape, axes, style.dtype, style.packed)
        self.bias = _param(shape[:-1], axes[:-1], style.dtype) if bias else None

    def __call__(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        """x [T, D] -> [T, outputs]."""
        y = kernels.linear(x, self.weight[...], self.outputs)
        return y if self.bias is None else y + self.bias[...].reshape(1, -1)


class RmsNorm(nnx.Module):
    """Zhang and Sennrich 2019, over the last axis, in float32."""

    def __init__(self, size: int, eps: float, style: _Style) -> None:
        self.eps = eps
        self.scale = _param((size,), (None,), style.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        # As a dot: a plain reduction becomes a tree of them on CPU, four loops for each norm of a step instead of two.
        squares = jnp.einsum("...d,...d->...", wide, wide, precision=jax.lax.Precision.HIGHEST)[..., None]
        normed = wide * jax.lax.rsqrt(squares / x.shape[-1] + self.eps)
        return normed.astype(x.dtype) * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))


class Embedding(nnx.Module):
    """Token vectors; the same array is the output head of models with tied embeddings."""

    def __init__(self, vocab: int, size: int, style: _Style) -> None:
        self.vocab = vocab
        self.packed = style.packed
        self.weight = _param((vocab, size), ("vocab", None), style.dtype, style.packed)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32[T] -> [T, D]."""
        weight = self.weight[...]
        return weight[tokens // PANEL, :, tokens % PANEL] if self.packed else weight[tokens]

    def logits(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        """x [T, D] -> float32[T, V]."""
        return kernels.linear(x, self.weight[...], self.vocab).astype(jnp.float32)


class Layer(nnx.Module):
    """Pre-norm attention, then pre-norm gated feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig, index: int, style: _Style) -> None:
        c = config
        # Nothing here may depend on the index but these two: layers that are alike are traced once.
        self.config, self.window, self.rotates = config, c.layer_window(index), c.layer_rotates(index)
        groups = c.heads // c.kv_heads + 2
        self.attn_norm = RmsNorm(c.hidden_size, c.norm_eps, style)
        self.qkv = Linear(
            (c.kv_heads, groups, c.head_dim, c.hidden_size), ("kv_heads", None, None, None), c.qkv_bias, style
        )
        self.q_norm = RmsNorm(c.head_dim, c.norm_eps, style) if c.qk_norm else None
        self.k_norm = RmsNorm(c.head_dim, c.norm_eps, style) if c.qk_norm else None
        self.out = Linear((c.hidden_size, c.heads * c.head_dim), (None, "heads"), c.output_bias, style)
        self.mlp_norm = RmsNorm(c.hidden_size, c.norm_eps, style)
        self.gate_up = Linear((2, c.ffn_size, c.hidden_size), (None, "ffn", None), c.mlp_bias, style)
        self.down = Linear((c.hidden_size, c.ffn_size), (None, "ffn"), c.mlp_bias, style)

    def __call__(self, x: jax.Array, kv: KvLayer, step: "_Step") -> tuple[jax.Array, KvLayer]:
        """x [T, D] -> the same, with this layer's keys and values written."""
        attended, kv = self._attention(self.attn_norm(x), kv, step)
        x = x + self.out(attended, step.kernels)
        return x + self._feed_forward(self.mlp_norm(x), step), kv

    def _attention(self, x: jax.Array, kv: KvLayer, step: "_Step") -> tuple[jax.Array, KvLayer]:
        c, tokens = self.config, x.shape[0]
        group = c.heads // c.kv_heads
        qkv = self.qkv(x, step.kernels).reshape(tokens, c.kv_heads, group + 2, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = jnp.split(qkv, (group, group + 1), axis=2)
            qkv = jnp.concatenate([self.q_norm(q), self.k_norm(k), v], axis=2)
        if self.rotates:
            qkv = rotate(qkv, *step.rotation)
        attended, kv = step.kernels.attend(
            qkv,
            kv,
            step.batch,
            window=self.window,
            scale=default_scale(c.head_dim),
            one_token_rows=step.one_token_rows,
        )
        return attended.reshape(tokens, c.heads * c.head_dim), kv

    def _feed_forward(self, x: jax.Array, step: "_Step") -> jax.Array:
        gate_up = self.gate_up(x, step.kernels).reshape(x.shape[0], 2, self.config.ffn_size)
        return self.down(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], step.kernels)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["batch", "rotation"],
    meta_fields=["kernels", "one_token_rows"],
)
@dataclass(frozen=True, slots=True)
class _Step:
    """What every layer of one call shares. A pytree: kernels and mode are static."""

    batch: PagedBatch
    rotation: tuple[jax.Array, jax.Array]
    kernels: Kernels
    one_token_rows: bool


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef, params: nnx.State, x: jax.Array, kv: KvLayer, step: _Step
) -> tuple[jax.Array, KvLayer]:
    """A layer as a function of its own. Inside a program this is traced and lowered once for all layers that are alike,
    which makes start-up with a warm cache several times quicker; XLA inlines the calls."""
    return nnx.merge(graph, params)(x, kv, step)


class Decoder(nnx.Module):
    """The whole network. Build it with `DecoderGraph.of`."""

    def __init__(self, config: ModelConfig, style: _Style) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, style)
        self.layers = nnx.List(Layer(config, index, style) for index in range(config.layers))
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, style)
        self.head = (
            None if config.tied_embeddings else Embedding(config.vocab_size, config.hidden_size, style)
        )

    def __call__(
        self,
        tokens: jax.Array,
        batch: PagedBatch,
        kv: tuple[KvLayer, ...],
        kernels: Kernels,
        constrain: Constrain,
        *,
        one_token_rows: bool,
    ) -> tuple[jax.Array, tuple[KvLayer, ...]]:
        """tokens int32[T] at their rows and positions -> (hidden [T, D] after the last norm, the new KV)."""
        step = _Step(batch, rotation(self.config, batch.positions), kernels, one_token_rows)
        x = constrain(self.embed(tokens), ("tokens", None))
        new_kv = []
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, layer_kv = _run_layer(*nnx.split(layer), x, layer_kv, step)
            x = constrain(x, ("tokens", None))
            new_kv.append(layer_kv)
        return self.norm(x), tuple(new_kv)

    def logits(self, hidden: jax.Array, kernels: Kernels) -> jax.Array:
        """hidden [T, D] -> float32[T, V]."""
        return (self.head or self.embed).logits(hidden, kernels)


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """A decoder taken apart: structure here, arrays as a flat tuple elsewhere, in the order of `specs`."""

    graph: nnx.GraphDef
    tree: Any
    specs: tuple[ParamSpec, ...]

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, *, packed: bool = False) -> "DecoderGraph":
        """Describe a decoder without allocating anything."""
        abstract = nnx.eval_shape(lambda: Decoder(config, _Style(dtype, packed)))
        graph, state = nnx.split(abstract)
        specs = tuple(
            ParamSpec(".".join(map(str, path)), *_fields(param.get_metadata()["spec"]))
            for path, param in nnx.to_flat_state(state)
        )
        return cls(graph, jax.tree.structure(state), specs)

    def merge(self, params: tuple[jax.Array, ...]) -> Decoder:
        """Parameters in the order of `specs` -> a decoder. While tracing only."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))


def _fields(spec: ParamSpec) -> tuple:
    return spec.shape, spec.dtype, spec.axes, spec.packed
