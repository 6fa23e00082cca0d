"""Parameters onto the devices, shard by shard: read, cast, packed if need be, placed. The host never holds a full copy.

Knows specs, a `WeightSource` and one sharding per spec; neither file formats nor what a mesh is.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .spec import ParamSpec, pack
from .weights import Index, WeightSource

THREADS = 4
"""Parameters in flight, which bounds the host memory that loading takes."""

ShardingFor = Callable[[ParamSpec], jax.sharding.Sharding]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def load_params(
    specs: Sequence[ParamSpec],
    source: WeightSource,
    sharding_for: ShardingFor,
    progress: Progress | None = None,
) -> tuple[jax.Array, ...]:
    """Load every parameter, in the order of `specs`.

    Raises:
        CheckpointError: before any weight is read, if specs and checkpoint do not fit.
    """
    source.check(specs)
    total, done = sum(spec.nbytes for spec in specs), 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="load") as pool:
        loading = {pool.submit(_load, spec, source, sharding_for(spec)): spec for spec in specs}
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


def _load(spec: ParamSpec, source: WeightSource, sharding: jax.sharding.Sharding) -> jax.Array:
    # The callback's arrays are never written again: on CPU the device may use their memory as it is.
    array = jax.make_array_from_callback(spec.stored_shape, sharding, _reader(spec, source, sharding))
    return array.block_until_ready()


def _reader(
    spec: ParamSpec, source: WeightSource, sharding: jax.sharding.Sharding
) -> Callable[[Index | None], np.ndarray]:
    """What gives a shard its content: its own rows where they are contiguous in the file, else a cut of the whole."""
    by_rows = not spec.packed and sharding.shard_shape(spec.shape)[-1] == spec.shape[-1]
    if by_rows or len(spec.shape) == 1:
        return lambda index: source.read(spec, index or _whole(spec))
    # A split along the inputs takes a piece of every row: one read of all rows serves all shards.
    whole = source.read(spec, _whole(spec))
    stored = pack(whole, spec.stacked) if spec.packed else whole
    return lambda index: np.ascontiguousarray(stored[index or ...])


def _whole(spec: ParamSpec) -> Index:
    return tuple(slice(0, size) for size in spec.shape)


def dummy_params(
    specs: Sequence[ParamSpec], sharding_for: ShardingFor, seed: int = 0
) -> tuple[jax.Array, ...]:
    """Small random numbers made on the devices (norm scales are 1), for measuring without weights."""
    key = jax.random.key(seed)
    fills: dict[tuple[object, ...], Callable[[jax.Array], jax.Array]] = {}
    result = []
    for number, spec in enumerate(specs):
        kind = (spec.stored_shape, spec.dtype, sharding_for(spec), spec.path.endswith(".scale"))
        if kind not in fills:
            shape, dtype, sharding, is_scale = kind
            fills[kind] = jax.jit(partial(_fill, shape, dtype, is_scale), out_shardings=sharding)
        result.append(fills[kind](jax.random.fold_in(key, number)))
    return tuple(result)


def _fill(shape: tuple[int, ...], dtype: str, is_scale: bool, key: jax.Array) -> jax.Array:
    if is_scale:
        return jnp.ones(shape, dtype)
    # Standard deviation 0.02, as models are initialised.
    return jax.random.uniform(key, shape, dtype, -0.035, 0.035)
