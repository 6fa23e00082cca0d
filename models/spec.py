"""One description of every parameter: path, shape, axes, physical form. Init, loading, sharding and byte counts read it.

Knows no checkpoint names (families do) and no devices (sharding does).

The paths and logical shapes of a decoder (letters as in the room's docstring, G = N/K):

    embed.weight                 [V, D]
    positions.weight             [rows, D]        learned positions
    embed_norm.scale             [D]              (every norm.scale: .bias too)
    layers.{i}.attn_norm.scale   [D]              (and attn_post_norm)
    layers.{i}.qkv.weight        [K, G+2, H, D]   per kv head: its G query heads, its key head, its value head
    layers.{i}.qkv.bias          [K, G+2, H]
    layers.{i}.q_norm.scale      [H]              (and k_norm; [K, G, H] for one a head, [N*H] over all heads)
    layers.{i}.sinks             [K, G]
    layers.{i}.latent.…                           instead of qkv, with `config.Latent`:
      q.weight                   [N, still + rotary, D]    or, of a vector of `query_rank` numbers, of these
      q_down.weight              [query_rank, D]           (q_down.bias, q_norm.scale)
      down.weight                [rank + rotary, D]        (down.bias, norm.scale [rank])
      up                         [N, still + value, rank]  per head: its keys, its values
    layers.{i}.….order           int32[D]         of a weight kept as it is stored, where its inputs are in another order
    layers.{i}.out.weight        [D, N*H]         (out.bias [D])
    layers.{i}.mlp_norm.scale    [D]              (and mlp_post_norm)
    layers.{i}.gate_up.weight    [2, F, D]        gate, then up (gate_up.bias [2, F])
    layers.{i}.up.weight         [F, D]           instead, where there is no gate (up.bias [F])
    layers.{i}.down.weight       [D, F]           (down.bias [D])
    layers.{i}.experts.…                          instead of these, where a layer has X experts:
      router.weight              [X, D]           (router.bias [X])
      choice_bias                [X]
      gate_up.weight             [X, 2, F, D]     (gate_up.bias [X, 2, F])
      down.weight                [X, D, F]        (down.bias [X, D])
      shared.gate_up.weight      [2, F, D]        and shared.down.weight [D, F]: one for every token
      shared_gate.weight         [1, D]
    norm.scale                   [D]
    head.weight                  [V, D]           absent when embeddings are tied (head.bias [V])
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, NamedTuple, TypeVar

import ml_dtypes  # noqa: F401 - makes bfloat16 a name that NumPy knows
import numpy as np

PANEL = 16
"""Output features per panel of a packed weight."""
GROUP = 32
"""Inputs that share a scale in a weight of 4 bits."""

Quant = Literal["int8", "int4", "fp8"]
"""Bits of a quantised weight, as `quantize.py` makes it; of `fp8` checkpoints only."""

Array = TypeVar("Array")


class Quantized(NamedTuple, Generic[Array]):
    """A weight in few bits: what stands for the one array that a plain weight is. A pytree."""

    values: Array
    """int8[..., D] or float8_e4m3fn[..., D], or uint8[..., D/2] where they are of 4 bits."""
    scales: Array
    """float32[..., 1] or one for each group of inputs; bfloat16[..., D/GROUP] of 4 bits."""
    floors: Array | None = None
    """bfloat16[..., D/GROUP] of values of 4 bits, which count up from it."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter. A weight contracts its last axis; the axes before it are outputs."""

    path: str
    shape: tuple[int, ...]
    """Logical shape."""
    dtype: str
    """What it is computed in, and stored in unless it is quantised."""
    axes: tuple[str | None, ...]
    """Logical axis names, one per dimension; None is never split."""
    packed: bool = False
    """Stored as panels (`pack`), for the native CPU kernels; never together with a sharded mesh."""
    stacked: bool = False
    """The first axis counts weights that are packed each for itself."""
    quant: Quant | None = None
    """Stored as a `Quantized`, made while it is read."""
    as_stored: bool = False
    """These bits are the checkpoint's own."""
    group: int = 0
    """Inputs that share a scale, of 8 bits; 0 for all of them."""

    @property
    def parts(self) -> tuple["ParamSpec", ...]:
        """The arrays it is stored as, each described like a parameter of its own: itself, or those of a `Quantized`."""
        if self.quant is None:
            return (self,)
        *outputs, inputs = self.shape
        *by_output, by_input = self.axes
        if self.quant != "int4":
            scales = (inputs // self.group, "float32", by_input) if self.group else (1, "float32", None)
            parts = ((inputs, "int8" if self.quant == "int8" else "float8_e4m3fn", by_input), scales)
        else:
            by_group = (inputs // GROUP, "bfloat16", by_input)
            parts = ((inputs // 2, "uint8", by_input), by_group, by_group)
        return tuple(
            replace(self, shape=(*outputs, size), dtype=dtype, axes=(*by_output, axis), quant=None)
            for size, dtype, axis in parts
        )

    def joined(self, arrays: Sequence[Array]) -> "Array | Quantized[Array]":
        """What stands for the parameter, of one array for each of `parts`."""
        return arrays[0] if self.quant is None else Quantized(*arrays)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the array on the device, of a parameter that is one."""
        if not self.packed:
            return self.shape
        *outputs, inputs = self.shape
        count = outputs[:1] if self.stacked else []
        return (*count, -(-math.prod(outputs[len(count) :]) // PANEL), inputs, PANEL)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, all shards together."""
        return sum(math.prod(part.stored_shape) * np.dtype(part.dtype).itemsize for part in self.parts)


def parameters(specs: Iterable[ParamSpec]) -> int:
    """Numbers in all, however they are stored."""
    return sum(math.prod(spec.shape) for spec in specs if spec.dtype != "int32")


def pack(weight: np.ndarray, stacked: bool = False) -> np.ndarray:
    """[..., inputs] -> [ceil(outputs/PANEL), inputs, PANEL]: each panel streams through memory in order. Zero padded. With
    `stacked` each entry of the first axis for itself."""
    if stacked:
        return np.stack([pack(one) for one in weight])
    flat = weight.reshape(-1, weight.shape[-1])
    outputs, inputs = flat.shape
    panels = -(-outputs // PANEL)
    if panels * PANEL != outputs:
        flat = np.concatenate([flat, np.zeros((panels * PANEL - outputs, inputs), flat.dtype)])
    return np.ascontiguousarray(flat.reshape(panels, PANEL, inputs).swapaxes(1, 2))


def paired(steps: np.ndarray) -> np.ndarray:
    """uint8[..., D] of 4 bits each -> uint8[..., D/2], as two of them share a byte."""
    groups = steps.reshape(*steps.shape[:-1], -1, 2, GROUP // 2)
    return (groups[..., 0, :] | groups[..., 1, :] << 4).reshape(*steps.shape[:-1], -1)
