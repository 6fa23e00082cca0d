"""A layer of experts: who goes where, and the feed-forward of many, of which each token takes few.

Tokens are put in order of their experts, so that each expert's are one block of rows of a grouped matmul; every device
does this for the experts it holds. Knows no tokens' requests, and not how groups are multiplied (`kernels.py`).
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import Experts, ModelConfig
from .kernels import Kernels, Weight
from .modules import Linear, Style, gated, param

MASKED = -1e30


class RoutedFeedForward(nnx.Module):
    """X experts, and perhaps one more for every token."""

    def __init__(self, config: ModelConfig, experts: Experts, style: Style) -> None:
        d, x, f = config.hidden_size, experts.count, experts.ffn_size
        self.config, self.choice = config, experts
        router_style = style.unquantized()
        router_style = replace(router_style, dtype="float32") if experts.wide_router else router_style
        self.router = Linear((x, d), (None, None), experts.router_bias, router_style)
        # In float32 whatever the rest is: what it decides between differs by less than bfloat16 tells apart.
        self.choice_bias = param((x,), (None,), "float32") if experts.choice_bias else None
        self.gate_up = Stack((x, 2, f, d), experts.bias, style)
        self.down = Stack((x, d, f), experts.bias, style)
        self.shared = Shared(config, experts.shared_ffn_size, style) if experts.shared_ffn_size else None
        self.shared_gate = (
            Linear((1, d), (None, None), False, style.unquantized()) if experts.shared_gate else None
        )

    def __call__(self, x: jax.Array, real: jax.Array, kernels: Kernels) -> jax.Array:
        """x [T, D], of which the rows that are `real` bool[T] count -> [T, D]."""
        bias = None if self.choice_bias is None else self.choice_bias[...]
        asking = x.astype(jnp.float32) if self.choice.wide_router else x
        chosen, shares = route(self.router(asking, kernels).astype(jnp.float32), self.choice, bias)
        # Padding goes to no expert: each one that is met is read from memory.
        chosen = jnp.where(real[:, None], chosen, self.choice.count)
        stacks = (*self.gate_up.arrays(), *self.down.arrays())

        def compute(first: jax.Array | int, rows: tuple[jax.Array, ...], stacks: tuple[Weight, ...]):
            x, chosen, shares = rows
            return self._routed(x, chosen, shares, first, stacks, kernels)

        rows = (x, chosen, shares)
        if kernels.placement is None:
            out = compute(0, rows, stacks)
        else:
            out = kernels.placement.over_experts(compute, rows, stacks)
        if self.shared is None:
            return out
        common = self.shared(x, kernels)
        if self.shared_gate is not None:
            common = common * jax.nn.sigmoid(self.shared_gate(x, kernels))
        return out + common

    def _routed(
        self,
        x: jax.Array,
        chosen: jax.Array,
        shares: jax.Array,
        first: jax.Array | int,
        stacks: tuple[Weight, ...],
        kernels: Kernels,
    ) -> jax.Array:
        """What the experts from `first` on, whose parameters are `stacks`, make of x [T, D] -> [T, D]."""
        (gate_up, *up_bias), (down, *down_bias) = stacks[: len(stacks) // 2], stacks[len(stacks) // 2 :]
        (tokens, choices), held = chosen.shape, jax.tree.leaves(gate_up)[0].shape[0]
        group = chosen.reshape(-1) - first
        group = jnp.where((group >= 0) & (group < held), group, held)
        order = jnp.argsort(group, stable=True)
        group = group[order]
        sizes = jnp.zeros(held, jnp.int32).at[group].add(1, mode="drop")

        def biased(y: jax.Array, bias: list[Any]) -> jax.Array:
            return y + bias[0].reshape(held, -1).at[group].get(mode="clip") if bias else y

        size = self.choice.ffn_size
        hidden = biased(kernels.grouped_linear(x[order // choices], gate_up, sizes, 2 * size), up_bias)
        hidden = gated(self.config, hidden.reshape(-1, 2, size), kernels)
        out = biased(kernels.grouped_linear(hidden, down, sizes, x.shape[1]), down_bias)
        out = jnp.where((group < held)[:, None], out, 0)
        by_token = jnp.zeros_like(out).at[order].set(out).reshape(tokens, choices, -1)
        return (by_token.astype(jnp.float32) * shares[:, :, None]).sum(axis=1).astype(x.dtype)


class Stack(nnx.Module):
    """One linear map an expert."""

    def __init__(self, shape: tuple[int, ...], bias: bool, style: Style) -> None:
        axes = ("experts", *(None,) * (len(shape) - 1))
        self.weight = param(shape, axes, style.dtype, style.packed, stacked=True, quant=style.quant)
        self.bias = param(shape[:-1], axes[:-1], style.dtype) if bias else None

    def arrays(self) -> tuple[Weight, ...]:
        """The weights, and the biases if there are any."""
        weight = self.weight.get_value()
        return (weight,) if self.bias is None else (weight, self.bias[...])


class Shared(nnx.Module):
    """The feed-forward of every token beside its experts."""

    def __init__(self, config: ModelConfig, size: int, style: Style) -> None:
        self.config, self.size = config, size
        self.gate_up = Linear((2, size, config.hidden_size), (None, "ffn", None), False, style)
        self.down = Linear((config.hidden_size, size), (None, "ffn"), False, style)

    def __call__(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        """x [T, D] -> [T, D]."""
        both = self.gate_up(x, kernels).reshape(x.shape[0], 2, self.size)
        return self.down(gated(self.config, both, kernels), kernels)


def route(logits: jax.Array, experts: Experts, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """float32[T, X], `choice_bias` float32[X] -> the experts of each token int32[T, k], and what it takes of each,
    float32[T, k]."""
    if experts.shares == "sparsemixer":
        return _sparse_mixer(logits, experts)
    shares = jax.nn.sigmoid(logits) if experts.shares == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    merit = shares if bias is None else shares + bias[None, :]
    if experts.groups > 1:
        merit = _in_best_groups(merit, experts)
    _, chosen = jax.lax.top_k(merit, experts.chosen)
    shares = jnp.take_along_axis(shares, chosen, axis=-1)
    if experts.normalized:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return chosen, shares * experts.share_scale


def _in_best_groups(merit: jax.Array, experts: Experts) -> jax.Array:
    """float32[T, X] -> the same, with nothing to be said for the experts of all but the best groups."""
    by_group = merit.reshape(len(merit), experts.groups, -1)
    best, _ = jax.lax.top_k(by_group, experts.group_best)
    _, groups = jax.lax.top_k(best.sum(axis=-1), experts.chosen_groups)
    among = (groups[:, :, None] == jnp.arange(experts.groups)[None, None, :]).any(axis=1)
    return jnp.where(among[:, :, None], by_group, MASKED).reshape(merit.shape)


def _sparse_mixer(logits: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """One expert after another; a share is a softmax over those that are not yet chosen and nearly as good as the best."""
    chosen, shares, left = [], [], logits
    for _ in range(experts.chosen):
        best = left.max(axis=-1, keepdims=True)
        worse = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * experts.mixer_jitter
        weights = jax.nn.softmax(jnp.where(worse, MASKED, left), axis=-1)
        index = left.argmax(axis=-1)
        chosen.append(index.astype(jnp.int32))
        shares.append(jnp.take_along_axis(weights, index[:, None], axis=-1)[:, 0])
        left = jnp.where(jnp.arange(logits.shape[-1])[None, :] == index[:, None], MASKED, left)
    return jnp.stack(chosen, axis=1), jnp.stack(shares, axis=1)
