"""Products of few rows with int8 weights on NVIDIA GPUs: a Pallas kernel that reads them as they are stored.

Such a product is bound by the weights' bytes. A program multiplies a tile of outputs with all rows over a part of the
inputs; the parts are added up by whoever reads them (split-K), so that few outputs fill the device too. Lowered through
Triton; `interpret` runs the same kernel anywhere.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ...models.spec import Quantized
from .pallas_gpu_bodies import LEAST_ROWS, PROGRAMS, bounded, dot, load, store

MOST_ROWS = LEAST_ROWS
"""With more, XLA's products are as quick or quicker (docs/performance.md, NVIDIA H200)."""

OUTPUTS, INPUTS = 64, 256
"""Of a tile of weights."""

WARPS, STAGES = 2, 3
"""Two warps multiply with instructions that take weights from registers, converted as they were read; four would take others,
which were slower."""

MOST_SPLITS = 16


def takes(x: jax.Array, weight: Quantized[jax.Array]) -> bool:
    """Whether `linear` is for such a product: few rows of 16 bits, int8 with a scale an output."""
    if weight.values.dtype != jnp.int8 or weight.scales.shape[-1] != 1:
        return False
    # The compiler counts in 32 bits.
    return x.shape[0] <= MOST_ROWS and x.dtype.itemsize == 2 and weight.values.size < 2**31


def linear(x: jax.Array, weight: Quantized[jax.Array], *, interpret: bool) -> jax.Array:
    """x [T, D] times a weight, values int8[N, D] and scales [N, 1] -> float32[T, N]."""
    (tokens, inputs), outputs = x.shape, weight.values.shape[0]
    tiles, turns = pl.cdiv(outputs, OUTPUTS), pl.cdiv(inputs, INPUTS)
    share = pl.cdiv(turns, _splits(tiles, turns))
    splits = pl.cdiv(turns, share)  # each has a turn at least
    parts = pl.pallas_call(
        partial(linear_kernel, share=share),
        grid=(tiles, splits),
        in_specs=[pl.BlockSpec(array.shape, lambda n, s: (0, 0)) for array in (x, weight.values)],
        out_specs=pl.BlockSpec((None, tokens, outputs), lambda n, s: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, tokens, outputs), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="xlane_byte_linear",
    )(x, weight.values)
    return parts.sum(axis=0) * weight.scales.T


def linear_kernel(x_ref, values_ref, out_ref, *, share: int):
    """Rows [T, D] times a tile of weights [N, D] over `share` turns of the inputs -> [T, N]."""
    (tokens, inputs), outputs = x_ref.shape, values_ref.shape[0]
    rows = _axis(jnp.arange(LEAST_ROWS, dtype=jnp.int32), tokens)
    tile = _axis(pl.program_id(0) * OUTPUTS + jnp.arange(OUTPUTS, dtype=jnp.int32), outputs)
    begin, all_turns = pl.program_id(1) * share, -(-inputs // INPUTS)
    turns: Any = jnp.minimum(share, all_turns - begin) if all_turns % share else share  # known is quicker

    def body(turn, acc):
        at = _axis((begin + turn) * INPUTS + jnp.arange(INPUTS, dtype=jnp.int32), inputs)
        # int8 is exact in bfloat16.
        values = load(values_ref, bounded(tile, at)).astype(x_ref.dtype)
        return acc + dot(values, load(x_ref, bounded(rows, at)).T)

    acc = jax.lax.fori_loop(0, turns, body, jnp.zeros((OUTPUTS, LEAST_ROWS), jnp.float32))
    store(out_ref, bounded(rows, tile), acc.T)


def _axis(index: jax.Array, size: int) -> tuple[jax.Array, int | None]:
    """What `bounded` is to know: where tiles cover an axis exactly, nothing lies outside."""
    return index, size if size % index.size else None


def _splits(tiles: int, turns: int) -> int:
    """Parts of the inputs: enough for a full device, each of a few turns at least."""
    return max(1, min(MOST_SPLITS, pl.next_power_of_2(pl.cdiv(PROGRAMS, tiles)), turns // 4))
