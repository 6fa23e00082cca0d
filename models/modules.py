"""What layers are made of: parameters that describe themselves, linear maps, the embedding.

Knows how weights are stored and who multiplies them; not what a layer does with it.
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from .config import ModelConfig
from .kernels import Kernels
from .quantize import dequantized
from .spec import GROUP, PANEL, ParamSpec, Quant, Quantized


@dataclass(frozen=True, slots=True)
class Style:
    """How parameters are stored."""

    dtype: str
    packed: bool
    quant: Quant | None = None
    """Of weights; of a map whose inputs do not divide into groups int8 where int4 is asked for."""

    def unquantized(self) -> "Style":
        """For a weight that is small and decides much."""
        return replace(self, quant=None)

    def by_row(self) -> "Style":
        """For a table of vectors, of which single rows are read too, and few bits cost most: int8 at least."""
        return replace(self, quant=self.quant and "int8")


def param(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: str,
    packed: bool = False,
    stacked: bool = False,
    quant: Quant | None = None,
) -> nnx.Param:
    """A parameter that carries its own description. Built under `nnx.eval_shape`, so nothing is allocated."""
    if quant == "int4" and shape[-1] % GROUP:
        quant = "int8"
    return _described(ParamSpec("", shape, dtype, axes, packed, stacked, quant))


def as_stored(weight: nnx.Param, quant: Quant, group: int) -> nnx.Param:
    """The same parameter in the bits the checkpoint has it in; in full where its inputs do not divide into groups."""
    spec: ParamSpec = weight.get_metadata()["spec"]
    if spec.shape[-1] % (GROUP if quant == "int4" else group or 1):
        return weight
    return _described(replace(spec, quant=quant, group=group, as_stored=True))


def _described(spec: ParamSpec) -> nnx.Param:
    return nnx.Param(
        spec.joined([jnp.zeros(part.stored_shape, part.dtype) for part in spec.parts]), spec=spec
    )


class Linear(nnx.Module):
    """y = x W^T + b. The weight's last axis is contracted; its other axes are the outputs."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], bias: bool, style: Style
    ) -> None:
        self.outputs = math.prod(shape[:-1])
        self.weight = param(shape, axes, style.dtype, style.packed, quant=style.quant)
        self.bias = param(shape[:-1], axes[:-1], style.dtype) if bias else None
        self.order: nnx.Param | None = None
        self.lora_a: nnx.Param | None = None
        self.lora_b: nnx.Param | None = None

    def put_in_order(self) -> None:
        """The weight's inputs are in another order than they come in."""
        spec: ParamSpec = self.weight.get_metadata()["spec"]
        self.order = nnx.data(param(spec.shape[-1:], (None,), "int32"))

    def adapt(self, dtype: str, ranks: int) -> None:
        """Add the adapters' parts, of so many ranks in all."""
        spec: ParamSpec = self.weight.get_metadata()["spec"]
        *outputs, inputs = spec.shape
        *by_output, by_input = spec.axes
        self.lora_a = nnx.data(param((ranks, inputs), (None, by_input), dtype))
        self.lora_b = nnx.data(param((*outputs, ranks), (*by_output, None), dtype))

    def __call__(self, x: jax.Array, kernels: Kernels, adapters: jax.Array | None = None) -> jax.Array:
        """x [T, D] -> [T, outputs]; `adapters` bool[T, S]: where a token has the adapter."""
        y = self._mapped(x, kernels)
        if adapters is None or self.lora_a is None or self.lora_b is None:
            return y
        # All adapters' ranks at once, then those of the others are struck out: they are few beside D, and a gather of each token's own
        # would read as much and multiply worse. Not by a factor of 0, which would leave a NaN of what overflows under another.
        own = jnp.repeat(adapters, self.lora_a.shape[0] // adapters.shape[1], axis=1)
        ranks = jnp.where(own, _times(x, self.lora_a[...]), 0.0)
        return y + _times(ranks.astype(x.dtype), self.lora_b[...].reshape(self.outputs, -1)).astype(y.dtype)

    def _mapped(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        if self.order is not None:
            x = x[:, self.order[...]]
        y = kernels.linear(x, self.weight.get_value(), self.outputs)
        return y if self.bias is None else y + self.bias[...].reshape(1, -1)


def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, D], weight [N, D] -> float32[T, N]."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


class Embedding(nnx.Module):
    """Token vectors; the same array is the output head of models with tied embeddings."""

    def __init__(self, vocab: int, size: int, style: Style, bias: bool = False) -> None:
        style = style.by_row()
        self.vocab, self.packed, self.dtype = vocab, style.packed, style.dtype
        self.weight = param((vocab, size), ("vocab", None), style.dtype, style.packed, quant=style.quant)
        self.bias = param((vocab,), ("vocab",), style.dtype) if bias else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32[T] -> [T, D]."""

        def rows(stored: jax.Array) -> jax.Array:
            return stored[tokens // PANEL, :, tokens % PANEL] if self.packed else stored[tokens]

        weight = jax.tree.map(rows, self.weight.get_value())
        return dequantized(weight, self.dtype) if isinstance(weight, Quantized) else weight

    def logits(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        """x [T, D] -> float32[T, V]."""
        logits = kernels.linear(x, self.weight.get_value(), self.vocab).astype(jnp.float32)
        return logits if self.bias is None else logits + self.bias[...].astype(jnp.float32)[None, :]


class Positions(nnx.Module):
    """Learned vectors of positions, each added to the embedding of the token that stands there."""

    def __init__(self, rows: int, size: int, offset: int, style: Style) -> None:
        self.offset = offset
        self.weight = param((rows, size), (None, None), style.dtype)

    def __call__(self, positions: jax.Array) -> jax.Array:
        """int32[T] -> [T, D]; padding (-1) reads the first."""
        return self.weight[...][jnp.maximum(positions, 0) + self.offset]


def gated(config: ModelConfig, both: jax.Array, kernels: Kernels) -> jax.Array:
    """What a gate leaves of the other projection, [T, 2, F] -> [T, F]."""
    if (limit := config.gate_limit) is not None:
        both = jnp.clip(both, jnp.array([[[-jnp.inf], [-limit]]], both.dtype), limit)
    if config.gate_plus_one:
        both = both + jnp.array([[[0], [1]]], both.dtype)
    return kernels.gated(both, config.activation)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Between -cap and cap, smoothly."""
    return cap * jnp.tanh(x / cap)
