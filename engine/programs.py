"""The compiled programs: one launch each, for a few numbers of lanes that decode and of prompt tokens beside them.

State and KV are donated. All are compiled ahead (`compile_all`), in parallel, through the persistent caches; afterwards only
compiled objects are called, which refuse other shapes instead of compiling anew. Where the cache has them all, a few that can
do any work are loaded first, and the others while those serve. What a launch does is in `step`. Knows no policy and no
requests.
"""

import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..models.spec import ParamSpec
from ..sharding.mesh import Placement
from .batch import plan_size
from .buckets import covering
from .monitor import CacheMisses
from .request import ProgramInfo
from .sampler import mask_width
from .state import LaneState, abstract_kv, abstract_state, described
from .step import Blueprint, Kv, Params, step
from .traced import TracedTexts
from .turn import Size

logger = logging.getLogger(__name__)

AT_ONCE = 4
"""Programs that are compiled at a time."""


class Programs:
    """The compiled programs of one engine. Calling one CONSUMES state and KV."""

    def __init__(
        self,
        blueprint: Blueprint,
        compiled: dict[str, Any],
        infos: tuple[ProgramInfo, ...],
        loader: ThreadPoolExecutor | None = None,
    ) -> None:
        """`compiled`: by name; a Future of one that `loader` is still to bring."""
        self.blueprint = blueprint
        self.infos = infos
        self._compiled = compiled
        self._loader = loader

    def __getitem__(self, name: str) -> Any:
        """A compiled program by the name its info has, to look into. Waits for it."""
        found = self._compiled[name]
        if isinstance(found, Future):
            found = self._compiled[name] = found.result()
        return found

    def __call__(
        self, size: Size, params: Params, kv: Kv, state: LaneState, plan: jax.Array, mask: jax.Array
    ) -> tuple[Kv, LaneState, tuple[jax.Array, jax.Array | None]]:
        """One launch, see `step.step`: a plan int32[plan_size] and a mask int32[R, mask_width] -> (kv, state,
        (int32[R, RESULT_WIDTH], int32[tokens, SCORE_WIDTH] or None)), where R are the rows, then the segments."""
        return self[size.name](params, kv, state, plan, mask)

    def smallest(self, rows: int, tokens: int) -> Size:
        """The smallest size for so many rows and prompt tokens whose program is here."""
        holding = (size for size in self.blueprint.sizes if size.holds(rows, tokens))
        smallest = next(holding)
        return smallest if self._is_here(smallest) else next(filter(self._is_here, holding), smallest)

    def _is_here(self, size: Size) -> bool:
        found = self._compiled[size.name]
        if not isinstance(found, Future):
            return True
        return found.done() and not found.cancelled() and found.exception() is None

    def wait(self) -> None:
        """Until all are here."""
        for name in self._compiled:
            self[name]

    def close(self) -> None:
        """Load no more."""
        if self._loader is not None:
            self._loader.shutdown(cancel_futures=True)


def compile_all(
    blueprint: Blueprint,
    progress: Callable[[int, int], None] | None = None,
    texts: Path | None = None,
    known: Sequence[ProgramInfo] = (),
) -> Programs:
    """Compile every program, smallest first, a few at a time. `progress(done, total)` is called at first and after each.
    `texts`: a folder that keeps what was traced.

    `known` says what the programs are where they were compiled before: then those that can do any work are waited for, and
    if the cache had these, the others come later.
    """
    kept = None if texts is None else TracedTexts(texts, blueprint)
    sizes = blueprint.sizes
    # Any work fits into one of these; the smallest of all is for whoever comes first, and is alone.
    enough = {sizes[0], *covering(sizes)} if known else sizes
    first = [size for size in sizes if size in enough]
    later = [size for size in sizes if size not in first]
    with CacheMisses() as misses:
        made = _compile_some(blueprint, first, kept, progress)
    if later and misses.count:
        made |= _compile_some(blueprint, later, kept, progress)
        later = []
    infos = known if later else [made[size.name][1] for size in sizes]
    compiled: dict[str, Any] = {name: program for name, (program, _) in made.items()}
    if not later:
        return Programs(blueprint, compiled, tuple(infos))
    loader = ThreadPoolExecutor(1, thread_name_prefix="programs")
    compiled |= {size.name: loader.submit(_load, blueprint, size, kept) for size in later}
    return Programs(blueprint, compiled, tuple(infos), loader)


def _compile_some(
    blueprint: Blueprint,
    sizes: Sequence[Size],
    kept: TracedTexts | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, tuple[Any, ProgramInfo]]:
    if progress is not None:
        progress(0, len(sizes))
    made: dict[str, tuple[Any, ProgramInfo]] = {}
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        lowered = ((size.name, _lower(blueprint, size, kept)) for size in sizes)
        futures = [(name, pool.submit(_compile, name, program)) for name, program in lowered]
        for name, future in futures:
            made[name] = future.result()
            if progress is not None:
                progress(len(made), len(sizes))
    return made


def _load(blueprint: Blueprint, size: Size, kept: TracedTexts | None) -> Any:
    try:
        with CacheMisses() as misses:
            program = _lower(blueprint, size, kept).compile()
    except Exception:  # larger ones do its work
        logger.exception("%s cannot be loaded", size.name)
        raise
    if misses.count:
        logger.warning("%s was gone from the cache and compiled while the engine served", size.name)
    return program


def _lower(blueprint: Blueprint, size: Size, kept: TracedTexts | None) -> Any:
    """Trace one program. Its inputs and outputs lie where the arrays of the engine lie, so nothing moves at a call."""
    b, segments = blueprint, blueprint.segments(size)
    params = abstract_weights(b)
    kv = abstract_kv(b.config, b.shapes, b.kv_dtype, b.placement)
    state = abstract_state(b.shapes, b.placement, adapters=b.config.lora is not None)
    plan_shape = (plan_size(size, segments, b.shapes.table_width),)
    mask_shape = (size.rows + segments, mask_width(b.shapes.vocab))
    plan, mask = (described(shape, jnp.int32, b.placement.replicated) for shape in (plan_shape, mask_shape))
    args = (params, kv, state, plan, mask)
    function = partial(step, b, size)
    if kept is not None:
        function = kept.function(size.name, function, args, (kv, state, (0, 0 if size.tokens else None)))

    def named(*args: Any) -> Any:
        return function(*args)

    named.__name__ = re.sub(r"\W+", "_", size.name).rstrip("_")
    shardings = jax.tree.map(lambda a: a.sharding, (kv, state))
    jitted = jax.jit(named, donate_argnums=(1, 2), out_shardings=(*shardings, b.placement.replicated))
    return jitted.lower(*args)


def _compile(name: str, lowered: Any) -> tuple[Any, ProgramInfo]:
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    info = ProgramInfo(
        name=name,
        compile_s=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
    )
    return compiled, info


def abstract_params(specs: Sequence[ParamSpec], placement: Placement) -> Params:
    """Shapes, types and placement of the parameters."""
    return tuple(
        spec.joined([described(p.stored_shape, p.dtype, param_sharding(placement, p)) for p in spec.parts])
        for spec in specs
    )


def abstract_weights(blueprint: Blueprint) -> Params:
    """Those of the decoder and of its draft heads."""
    b = blueprint
    decoder, heads = (abstract_params(specs, b.placement) for specs in (b.graph.specs, b.head_specs))
    tokens = b.heads and described((b.heads.candidates,), jnp.int32, b.placement.replicated)
    return decoder if tokens is None else (*decoder, *heads, tokens)


def param_sharding(placement: Placement, spec: ParamSpec) -> jax.sharding.NamedSharding:
    """Where one parameter lies, or one part of a quantised one."""
    return placement.replicated if spec.packed else placement.fitted(spec.axes, spec.shape)
