"""One decoder for all families: embed, layers of attention and feed-forward, norm, logits. Flax NNX modules.

Modules describe the network and its parameters. They are split once, at start, into a flat tuple of arrays
(`DecoderGraph`) and merged again only while tracing: no module ever enters a compiled call. Pure in (parameters, tokens,
positions, KV). Knows nothing of lanes, sampling or where kernels come from.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding.axes import Constrain
from .attention import default_scale
from .config import Lora, ModelConfig
from .experts import RoutedFeedForward, Stack
from .kernels import Kernels, KvLayer, PagedBatch, Weight
from .latent import Attend, LatentAttention
from .modules import Embedding, Linear, Positions, Style, as_stored, gated, param, softcap
from .norms import norm
from .rope import rotate, rotation
from .rowwise import ACTIVATIONS
from .spec import ParamSpec, Quant


class Layer(nnx.Module):
    """Attention and feed-forward, each added to the stream, with norms before them, behind them or both."""

    def __init__(self, config: ModelConfig, index: int, style: Style) -> None:
        c = config
        # Nothing here may depend on the index but these four (`experts` below): layers that are alike are traced once.
        self.config, self.window = config, c.layer_window(index)
        self.rotates, self.local = c.layer_rotates(index), c.layer_rotates_locally(index)
        group = c.heads // c.kv_heads
        self.attn_norm = norm(c, style, c.hidden_size) if c.pre_norms else None
        self.latent = LatentAttention(c, c.latent, style) if c.latent else None
        if self.latent is None:
            self.qkv = Linear(
                (c.kv_heads, group + 2, c.head_dim, c.hidden_size),
                ("kv_heads", None, None, None),
                c.qkv_bias,
                style,
            )
        self.q_norm = _head_norm(c, style, group) if c.qk_norm else None
        self.k_norm = _head_norm(c, style, 1) if c.qk_norm else None
        self.sinks = (
            param((c.kv_heads, group), ("kv_heads", None), style.dtype) if c.attention_sinks else None
        )
        self.out = Linear((c.hidden_size, c.heads * c.value_size), (None, "heads"), c.output_bias, style)
        self.attn_post_norm = norm(c, style, c.hidden_size) if c.post_norms else None
        self.mlp_norm = norm(c, style, c.hidden_size) if c.pre_norms and not c.shared_norm else None
        experts = c.layer_experts(index)
        self.experts = RoutedFeedForward(c, experts, style) if experts else None
        self.mlp_post_norm = norm(c, style, c.hidden_size) if c.post_norms else None
        if experts:
            return
        if c.gated:
            self.gate_up = Linear((2, c.ffn_size, c.hidden_size), (None, "ffn", None), c.mlp_bias, style)
        else:
            self.up = Linear((c.ffn_size, c.hidden_size), ("ffn", None), c.mlp_bias, style)
        self.down = Linear((c.hidden_size, c.ffn_size), (None, "ffn"), c.mlp_bias, style)

    def __call__(self, x: jax.Array, kv: KvLayer, step: "_Step") -> tuple[jax.Array, KvLayer]:
        """x [T, D] -> the same, with this layer's keys and values written."""
        through = partial(_through, kernels=step.kernels)
        read = through(self.attn_norm, x)
        attend = partial(self._attend, kv=kv, step=step)
        if self.latent is None:
            attended, kv = self._attention(read, attend, step)
        else:
            attended, kv = self.latent(read, attend, step.rotation, step.kernels, step.adapters)
        attended = self._added(through(self.attn_post_norm, self.out(attended, step.kernels, step.adapters)))
        if not self.config.parallel:
            x = x + attended
        if not self.config.shared_norm:
            read = through(self.mlp_norm, x)
        fed = self._added(through(self.mlp_post_norm, self._feed_forward(read, step)))
        return x + (attended + fed if self.config.parallel else fed), kv

    def _added(self, branch: jax.Array) -> jax.Array:
        scale = self.config.residual_scale
        return branch if scale == 1.0 else branch * jnp.asarray(scale, branch.dtype)

    def _attend(self, qkv: jax.Array, *, kv: KvLayer, step: "_Step") -> tuple[jax.Array, KvLayer]:
        c = self.config
        return step.kernels.attend(
            qkv,
            kv,
            step.batch,
            window=self.window,
            scale=c.attention_scale or default_scale(c.head_dim),
            one_token_rows=step.one_token_rows,
            softcap=c.attention_softcap,
            slopes=c.alibi_slopes,
            sinks=None if self.sinks is None else self.sinks[...],
            value_dim=c.value_dim,
        )

    def _attention(self, x: jax.Array, attend: Attend, step: "_Step") -> tuple[jax.Array, KvLayer]:
        c, tokens = self.config, x.shape[0]
        group = c.heads // c.kv_heads
        qkv = self.qkv(x, step.kernels, step.adapters).reshape(tokens, c.kv_heads, group + 2, c.head_dim)
        if c.qkv_clip is not None:
            qkv = jnp.clip(qkv, -c.qkv_clip, c.qkv_clip)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = jnp.split(qkv, (group, group + 1), axis=2)
            normed = partial(self._normed, kernels=step.kernels)
            qkv = jnp.concatenate([normed(self.q_norm, q), normed(self.k_norm, k), v], axis=2)
        if self.rotates:
            qkv = rotate(qkv, step.local_rotation if self.local else step.rotation, c)
        attended, kv = attend(qkv)
        return attended.reshape(tokens, c.heads * c.head_dim), kv

    def _normed(self, head_norm: Any, x: jax.Array, kernels: Kernels) -> jax.Array:
        """Queries [T, K, G, H] or keys [T, K, 1, H], each head for itself or all together."""
        flat = x.reshape(len(x), -1) if self.config.qk_norm == "row" else x
        return head_norm(flat, kernels).reshape(x.shape)

    def _feed_forward(self, x: jax.Array, step: "_Step") -> jax.Array:
        if self.experts is not None:
            return self.experts(x, step.batch.positions >= 0, step.kernels)
        if not self.config.gated:
            activate = ACTIVATIONS[self.config.activation]
            up = self.up(x, step.kernels, step.adapters)
            return self.down(activate(up), step.kernels, step.adapters)
        gate_up = self.gate_up(x, step.kernels, step.adapters).reshape(x.shape[0], 2, self.config.ffn_size)
        return self.down(gated(self.config, gate_up, step.kernels), step.kernels, step.adapters)


def _head_norm(c: ModelConfig, style: Style, members: int) -> Any:
    """The norm of `members` heads (queries, or the key) of every kv head."""
    match c.qk_norm:
        case "row":
            return norm(c, style, c.kv_heads * members * c.head_dim)
        case "each_head":
            return norm(c, style, c.kv_heads, members, c.head_dim)
        case _:
            return norm(c, style, c.head_dim)


def _through(layer_norm: Any, x: jax.Array, kernels: Kernels) -> jax.Array:
    return x if layer_norm is None else layer_norm(x, kernels)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["batch", "rotation", "local_rotation", "adapters"],
    meta_fields=["kernels", "one_token_rows"],
)
@dataclass(frozen=True, slots=True)
class _Step:
    """What every layer of one call shares. A pytree: kernels and mode are static."""

    batch: PagedBatch
    rotation: tuple[jax.Array, ...]
    local_rotation: tuple[jax.Array, ...]
    """Empty where no layer needs it."""
    adapters: jax.Array | None
    """bool[T, S]: where a token has the adapter; None where there are none."""
    kernels: Kernels
    one_token_rows: int


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef, params: nnx.State, x: jax.Array, kv: KvLayer, step: _Step
) -> tuple[jax.Array, KvLayer]:
    """A layer as a function of its own. Inside a program this is traced and lowered once for all layers that are alike,
    which makes start-up with a warm cache several times quicker; XLA inlines the calls."""
    return nnx.merge(graph, params)(x, kv, step)


class Decoder(nnx.Module):
    """The whole network. Build it with `DecoderGraph.of`."""

    def __init__(self, config: ModelConfig, style: Style) -> None:
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.hidden_size, style)
        self.positions = (
            Positions(c.learned_positions, c.hidden_size, c.position_offset, style)
            if c.learned_positions
            else None
        )
        self.embed_norm = norm(c, style, c.hidden_size) if c.embedding_norm else None
        self.layers = nnx.List(Layer(c, index, style) for index in range(c.layers))
        self.norm = norm(c, style, c.hidden_size)
        self.head = (
            None if c.tied_embeddings else Embedding(c.vocab_size, c.hidden_size, style, bias=c.head_bias)
        )

    def __call__(
        self,
        tokens: jax.Array,
        batch: PagedBatch,
        kv: tuple[KvLayer, ...],
        kernels: Kernels,
        constrain: Constrain,
        *,
        one_token_rows: int,
        adapters: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[KvLayer, ...]]:
        """tokens int32[T] at their rows and positions -> (hidden [T, D] after the last norm, the new KV). `adapters` int32[T]:
        the number of each token's adapter from 1 up, 0 for none."""
        turns = self.config.rope_theta is not None
        step = _Step(
            batch,
            rotation(self.config, batch.positions) if turns else (),
            rotation(self.config, batch.positions, local=True) if self.config.rope_local_theta else (),
            self._chosen(adapters),
            kernels,
            one_token_rows,
        )
        x = constrain(self._embedded(tokens, batch, kernels), ("tokens", None))
        new_kv = []
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, layer_kv = _run_layer(*nnx.split(layer), x, layer_kv, step)
            x = constrain(x, ("tokens", None))
            new_kv.append(layer_kv)
        return self.norm(x, kernels), tuple(new_kv)

    def _chosen(self, adapters: jax.Array | None) -> jax.Array | None:
        if adapters is None or self.config.lora is None:
            return None
        return jax.nn.one_hot(adapters - 1, self.config.lora.slots, dtype=jnp.bool_)

    def _embedded(self, tokens: jax.Array, batch: PagedBatch, kernels: Kernels) -> jax.Array:
        x = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(batch.positions)
        # Padding begins as zeros, for which kernels on CPUs compute nothing, and stays so where no bias follows.
        return jnp.where(batch.positions[:, None] >= 0, _through(self.embed_norm, x, kernels), 0)

    def logits(self, hidden: jax.Array, kernels: Kernels) -> jax.Array:
        """hidden [T, D] -> float32[T, V]."""
        c, logits = self.config, (self.head or self.embed).logits(hidden, kernels)
        if c.logits_scale != 1.0:
            logits = logits * c.logits_scale
        return logits if c.logits_softcap is None else softcap(logits, c.logits_softcap)


def _described(config: ModelConfig, style: Style) -> Decoder:
    """A decoder in which what the checkpoint has in few bits stays in them, unless others are asked for; with its adapters."""
    decoder = Decoder(config, style)
    if config.lora is not None:
        _adapt(decoder, config.lora, style)
    stored = {weight.path: weight for weight in config.stored if style.quant in (None, weight.quant)}
    for path, module in nnx.iter_modules(decoder) if stored else ():
        weight = stored.get(".".join(map(str, (*path, "weight"))))
        if weight is None or not isinstance(module, Linear | Embedding | Stack):
            continue
        module.weight = as_stored(module.weight, weight.quant, weight.group)
        if weight.ordered and isinstance(module, Linear) and module.weight.get_metadata()["spec"].as_stored:
            module.put_in_order()
    return decoder


def _adapt(decoder: Decoder, lora: Lora, style: Style) -> None:
    maps = dict(lora.maps)
    for path, module in nnx.iter_modules(decoder):
        parts = maps.get(".".join(map(str, path)))
        if parts and isinstance(module, Linear):
            module.adapt(style.dtype, lora.slots * parts * lora.rank)


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """A decoder taken apart: structure here, parameters as a tuple elsewhere, in the order of `specs`."""

    graph: nnx.GraphDef
    tree: Any
    specs: tuple[ParamSpec, ...]

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: str, *, packed: bool = False, quant: Quant | None = None
    ) -> "DecoderGraph":
        """Describe a decoder without allocating anything."""
        abstract = nnx.eval_shape(lambda: _described(config, Style(dtype, packed, quant)))
        graph, state = nnx.split(abstract)
        specs = tuple(
            replace(param.get_metadata()["spec"], path=".".join(map(str, path)))
            for path, param in nnx.to_flat_state(state)
        )
        return cls(graph, jax.tree.structure(state), specs)

    def merge(self, params: tuple[Weight, ...]) -> Decoder:
        """Parameters in the order of `specs` -> a decoder. While tracing only."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, jax.tree.leaves(params)))
