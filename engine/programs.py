"""The compiled programs: one launch each, for a few numbers of lanes that decode and of prompt tokens beside them.

State and KV are donated. All are compiled ahead (`compile_all`), in parallel, through the persistent caches; afterwards only
compiled objects are called, which refuse other shapes instead of compiling anew. What a launch does is in `step`. Knows no
policy and no requests.
"""

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..models.spec import ParamSpec
from ..sharding.mesh import Placement
from .batch import plan_size
from .request import ProgramInfo
from .sampler import mask_width
from .state import LaneState, abstract_kv, abstract_state, described
from .step import Blueprint, Kv, Params, step
from .traced import TracedTexts
from .turn import Size


class Programs:
    """The compiled programs of one engine. Calling one CONSUMES state and KV."""

    def __init__(
        self, blueprint: Blueprint, compiled: dict[str, Any], infos: tuple[ProgramInfo, ...]
    ) -> None:
        self.blueprint = blueprint
        self.infos = infos
        self._compiled = compiled

    def __getitem__(self, name: str) -> Any:
        """A compiled program by the name its info has, to look into."""
        return self._compiled[name]

    def __call__(
        self, size: Size, params: Params, kv: Kv, state: LaneState, plan: jax.Array, mask: jax.Array
    ) -> tuple[Kv, LaneState, tuple[jax.Array, jax.Array | None]]:
        """One launch, see `step.step`: a plan int32[plan_size] and a mask int32[R, mask_width] -> (kv, state,
        (int32[R, RESULT_WIDTH], int32[tokens, SCORE_WIDTH] or None)), where R are the rows, then the segments."""
        return self._compiled[size.name](params, kv, state, plan, mask)


def compile_all(
    blueprint: Blueprint, progress: Callable[[int, int], None] | None = None, texts: Path | None = None
) -> Programs:
    """Compile every program, smallest first, a few at a time. `progress(done, total)` is called at first and after each.
    `texts`: a folder that keeps what was traced."""
    sizes = blueprint.sizes
    done = 0
    if progress is not None:
        progress(0, len(sizes))
    compiled: dict[str, Any] = {}
    infos: list[ProgramInfo] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        kept = None if texts is None else TracedTexts(texts, blueprint)
        lowered = ((size.name, _lower(blueprint, size, kept)) for size in sizes)
        futures = [(name, pool.submit(_compile, name, program)) for name, program in lowered]
        for name, future in futures:
            compiled[name], info = future.result()
            infos.append(info)
            done += 1
            if progress is not None:
                progress(done, len(sizes))
    return Programs(blueprint, compiled, tuple(infos))


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
