"""Products with weights of 8 bits on NVIDIA GPUs: a Pallas kernel that reads them as they are stored.

Few rows are bound by the weights' bytes, and XLA makes more of those than there are (docs/performance.md). A program
multiplies a tile of outputs with a tile of rows over a part of the inputs; the parts are added up by whoever reads them
(split-K), so that few outputs fill the device too. Lowered through Triton; `interpret` runs the same kernel anywhere.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ...models.spec import Quantized
from .pallas_gpu_bodies import LEAST_ROWS, bounded, dot, load, store

PROGRAMS = 528
"""That keep a device busy: 4 for each of 132 multiprocessors."""

MOST_SPLITS = 16

MOST_ROWS = 64
"""With more, arithmetic bounds, and XLA's products are quicker."""

MOST_TILE_ROWS = 64


class Tile(NamedTuple):
    """What one program multiplies, and how."""

    rows: int
    outputs: int = 64
    inputs: int = 128
    warps: int = 4
    stages: int = 4
    programs: int = PROGRAMS


def tile_of(tokens: int) -> Tile:
    """For so many rows."""
    rows = max(LEAST_ROWS, min(MOST_TILE_ROWS, pl.next_power_of_2(tokens)))
    # Two warps multiply with instructions that take weights from registers as they were read, eight bytes a thread.
    return Tile(rows, warps=2) if rows <= 32 else Tile(rows)


def takes(x: jax.Array, weight: Quantized[jax.Array], *, fp8: bool) -> bool:
    """Whether `linear` is for such a product: few rows of 16 bits, and weights of 8 in groups that tiles can follow. `fp8`: the device
    converts FP8."""
    if weight.floors is not None or x.shape[0] > MOST_ROWS or x.dtype.itemsize != 2:
        return False
    group = x.shape[1] // weight.scales.shape[-1]
    in_tiles = weight.scales.shape[-1] == 1 or (group >= LEAST_ROWS and group & (group - 1) == 0)
    # The compiler counts in 32 bits.
    return in_tiles and weight.values.size < 2**31 and (weight.values.dtype == jnp.int8 or fp8)


def linear(x: jax.Array, weight: Quantized[jax.Array], tile: Tile, *, interpret: bool) -> jax.Array:
    """x [T, D] times a weight of 8 bits, values [N, D] and scales [N, 1] or [N, D / group] -> float32[T, N]."""
    (tokens, inputs), outputs, groups = x.shape, weight.values.shape[0], weight.scales.shape[1]
    if groups > 1:
        tile = tile._replace(inputs=min(tile.inputs, inputs // groups))
    grid = (pl.cdiv(tokens, tile.rows), pl.cdiv(outputs, tile.outputs))
    turns = pl.cdiv(inputs, tile.inputs)
    splits = _splits(grid[0] * grid[1], turns, tile.programs)
    given = (x, weight.values, *([weight.scales] if groups > 1 else []))
    sums = pl.pallas_call(
        partial(linear_kernel, tile=tile, share=pl.cdiv(turns, splits)),
        grid=(*grid, splits),
        in_specs=[pl.BlockSpec(array.shape, lambda t, n, s: (0, 0)) for array in given],
        out_specs=pl.BlockSpec((None, tokens, outputs), lambda t, n, s: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, tokens, outputs), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="xlane_byte_linear",
    )(*given)
    product = sums.sum(axis=0)
    return product if groups > 1 else product * weight.scales.T


def linear_kernel(x_ref, values_ref, *refs, tile: Tile, share: int):
    """Rows [T, D] times weights [N, D], with scales [N, D / group] where they differ along the inputs, `share` turns of
    them -> [T, N]."""
    *scales, out_ref = refs
    (tokens, inputs), outputs = x_ref.shape, values_ref.shape[0]
    token = pl.program_id(0) * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    output = pl.program_id(1) * tile.outputs + jnp.arange(tile.outputs, dtype=jnp.int32)
    begin = pl.program_id(2) * share
    turns: Any = share
    if -(-inputs // tile.inputs) % share:
        turns = jnp.minimum(share, -(-inputs // tile.inputs) - begin)

    def body(turn, acc):
        first = (begin + turn) * tile.inputs
        at = first + jnp.arange(tile.inputs, dtype=jnp.int32)
        columns = _axis(at, inputs)
        values = load(values_ref, bounded(_axis(output, outputs), columns))
        x = load(x_ref, bounded(_axis(token, tokens), columns))
        part = dot(values.astype(x.dtype), x.T)
        if scales:
            group = jnp.full(1, first // (inputs // scales[0].shape[1]))
            part *= load(scales[0], bounded(_axis(output, outputs), (group, None)))
        return acc + part

    acc = jnp.zeros((tile.outputs, tile.rows), jnp.float32)
    acc = jax.lax.fori_loop(0, turns, body, acc)
    store(out_ref, bounded(_axis(token, tokens), _axis(output, outputs)), acc.T)


def _axis(index: jax.Array, size: int) -> tuple[jax.Array, int | None]:
    """What `bounded` is to know: where tiles cover an axis exactly, nothing lies outside."""
    return index, size if size % index.size else None


def _splits(programs: int, turns: int, wanted: int) -> int:
    """Parts of the inputs, a power of two: enough for a full device, each of a few turns at least."""
    return max(1, min(MOST_SPLITS, pl.next_power_of_2(-(-wanted // programs)), turns // 4))
