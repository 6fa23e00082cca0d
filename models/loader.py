"""Parameters onto the devices, shard by shard: read, cast, quantised and packed if need be, placed. The host never holds a
full copy.

Knows specs, a `WeightSource` and one sharding per spec; neither file formats nor what a mesh is.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .kernels import Weight
from .quantize import INT4_MOST, INT8_MOST, quantized
from .spec import ParamSpec, pack
from .weights import Index, WeightSource

THREADS = 4
"""Parameters in flight, which bounds the host memory that loading takes."""

BLOCK_BYTES = 1 << 20
"""Of a weight in float32, quantised at a time."""
MOST = 0.035
"""Magnitude of dummy weights: a standard deviation of 0.02, as models are initialised."""

ShardingFor = Callable[[ParamSpec], jax.sharding.Sharding]
Reader = Callable[[Index | None], np.ndarray]
"""Gives the content of one shard of an array."""
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def load_params(
    specs: Sequence[ParamSpec],
    source: WeightSource,
    sharding_for: ShardingFor,
    progress: Progress | None = None,
) -> tuple[Weight, ...]:
    """Load every parameter, in the order of `specs`. `sharding_for` is asked for each array (`ParamSpec.parts`).

    Raises:
        CheckpointError: before any weight is read, if specs and checkpoint do not fit.
    """
    source.check(specs)
    total, done = sum(spec.nbytes for spec in specs), 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="load") as pool:
        loading = {pool.submit(_load, spec, source, sharding_for): spec for spec in specs}
        try:
            for future in as_completed(loading):
                future.result()
                done += loading[future].nbytes
                if progress:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(future.result() for future in loading)


def _load(spec: ParamSpec, source: WeightSource, sharding_for: ShardingFor) -> Weight:
    shardings = [sharding_for(part) for part in spec.parts]
    # The callbacks' arrays are never written again: on CPU the device may use their memory as it is.
    arrays = [
        jax.make_array_from_callback(part.stored_shape, sharding, read).block_until_ready()
        for part, sharding, read in zip(spec.parts, shardings, _readers(spec, source, shardings), strict=True)
    ]
    return spec.joined(arrays)


def _readers(
    spec: ParamSpec, source: WeightSource, shardings: Sequence[jax.sharding.Sharding]
) -> list[Reader]:
    """What gives the shards of each part their content: their own rows where these are contiguous in the file, else a cut
    of the whole."""
    by_rows = not spec.packed and all(
        sharding.shard_shape(part.shape)[-1] == part.shape[-1]
        for part, sharding in zip(spec.parts, shardings, strict=True)
    )
    if by_rows or len(spec.shape) == 1:
        read = _Rows(spec, source)
        return [partial(read, number) for number in range(len(spec.parts))]
    # A split along the inputs takes a piece of every row: one read of all rows serves all shards.
    whole = _stored(spec, source, _whole(spec))
    stored = [pack(part, spec.stacked) for part in whole] if spec.packed else whole
    return [partial(_cut, part) for part in stored]


def _cut(whole: np.ndarray, index: Index | None) -> np.ndarray:
    return np.ascontiguousarray(whole[index or ...])


class _Rows:
    """Reads a shard when the first of its parts is asked for; the parts of a parameter have their rows alike."""

    def __init__(self, spec: ParamSpec, source: WeightSource) -> None:
        self._spec, self._source = spec, source
        self._left: dict[tuple[tuple[int, int, int], ...], tuple[np.ndarray, ...]] = {}

    def __call__(self, number: int, index: Index | None) -> np.ndarray:
        """Part `number` of a shard."""
        rows = (*(index or _whole(self._spec))[:-1], slice(self._spec.shape[-1]))
        if len(self._spec.parts) == 1:
            return _stored(self._spec, self._source, index or rows)[0]
        key = tuple(part.indices(size) for part, size in zip(rows, self._spec.shape, strict=True))
        if key not in self._left:
            self._left[key] = _stored(self._spec, self._source, rows)
        return self._left[key][number]


def _stored(spec: ParamSpec, source: WeightSource, index: Index) -> tuple[np.ndarray, ...]:
    """A slice of each part, not packed. Of a quantised weight never more than BLOCK_BYTES are there unquantised."""
    if spec.quant is None:
        return (source.read(spec, index),)
    sizes = [len(range(*part.indices(size))) for part, size in zip(index[:-1], spec.shape, strict=False)]
    out = tuple(np.empty((*sizes, part.shape[-1]), part.dtype) for part in spec.parts)
    read = partial(source.read, replace(spec, dtype="float32"))
    read = _Entries(read) if source.by_entry(spec) else read
    for here, there in _blocks(index, spec.shape):
        if spec.as_stored:
            made = source.read_parts(spec, there)
        else:
            made = jax.tree.leaves(quantized(read(there), spec.quant))
        for part, block in zip(out, made, strict=True):
            part[here] = block
    return out


class _Entries:
    """Blocks of rows out of entries of the first axis, each of which is read once: blocks come in order."""

    def __init__(self, read: Callable[[Index], np.ndarray]) -> None:
        self._read = read
        self._at, self._entry = -1, np.empty(0)

    def __call__(self, index: Index) -> np.ndarray:
        """A block as `_blocks` cuts them: of one entry, or several whole ones."""
        first, *rest = index
        if first.stop - first.start > 1:
            return self._read(index)
        if self._at != first.start:
            self._at, self._entry = first.start, self._read((first, *(slice(None) for _ in rest)))
        return self._entry[(slice(None), *rest)]


def _blocks(index: Index, shape: tuple[int, ...]) -> Iterator[tuple[Index, Index]]:
    """Cut a slice of an array of float32 into blocks of rows -> (where in the slice, where in the array)."""
    start, stop, _ = index[0].indices(shape[0])
    entry_bytes = 4 * math.prod(shape[1:])
    if entry_bytes > BLOCK_BYTES and len(shape) > 2:
        for at in range(start, stop):
            for here, there in _blocks(index[1:], shape[1:]):
                yield (slice(at - start, at - start + 1), *here), (slice(at, at + 1), *there)
        return
    step = max(1, BLOCK_BYTES // entry_bytes)
    for at in range(start, stop, step):
        end = min(at + step, stop)
        yield (slice(at - start, end - start),), (slice(at, end), *index[1:])


def _whole(spec: ParamSpec) -> Index:
    return tuple(slice(0, size) for size in spec.shape)


def dummy_params(specs: Sequence[ParamSpec], sharding_for: ShardingFor, seed: int = 0) -> tuple[Weight, ...]:
    """Small random numbers made on the devices (norm scales are 1), for measuring without weights."""
    key = jax.random.key(seed)
    fills: dict[tuple[object, ...], Callable[[jax.Array], jax.Array]] = {}
    result = []
    for number, spec in enumerate(specs):
        arrays = []
        for order, part in enumerate(spec.parts):
            constant = _constant(spec, order)
            kind = (part.stored_shape, part.dtype, sharding_for(part), constant)
            if kind not in fills:
                shape, dtype, sharding, _ = kind
                fills[kind] = jax.jit(partial(_fill, shape, dtype, constant), out_shardings=sharding)
            arrays.append(fills[kind](jax.random.fold_in(key, number)))
        result.append(spec.joined(arrays))
    return tuple(result)


def _constant(spec: ParamSpec, part: int) -> float | None:
    """What an array is full of, if it is not random."""
    if part > 0:
        return {"int8": (MOST / INT8_MOST,), "int4": (2 * MOST / INT4_MOST, -MOST), "fp8": (1.0,)}[
            spec.quant or "int8"
        ][part - 1]
    return 1.0 if spec.path.endswith(".scale") else 0 if spec.dtype == "int32" else None


def _fill(shape: tuple[int, ...], dtype: str, constant: float | None, key: jax.Array) -> jax.Array:
    if constant is not None:
        return jnp.full(shape, constant, dtype)
    if dtype in ("int8", "uint8"):
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
    drawn = "float32" if dtype.startswith("float8") else dtype
    return jax.random.uniform(key, shape, drawn, -MOST, MOST).astype(dtype)
