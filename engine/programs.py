"""The compiled programs: decode over a few row counts, prefill over a few token counts. Token ids in, token ids out.

Each is one launch: embed, layers, sampling, bookkeeping of lanes, and one packed result. State and KV are donated. All
are compiled ahead (`compile_all`), in parallel, through the persistent cache; afterwards only compiled objects are
called, which refuse other shapes instead of compiling anew. Knows no policy and no requests.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..models.config import ModelConfig
from ..models.decoder import DecoderGraph
from ..models.kernels import Kernels, KvLayer, PagedBatch, Weight
from ..models.spec import ParamSpec, Quant
from ..sharding.mesh import Placement
from .batch import DECODE_WIDTH, pack_result, prefill_size, read_decode, read_prefill
from .prompt_scores import block_rows, prompt_scores
from .request import ProgramInfo
from .sampler import IN_PROMPT, SamplingRows, mask_width, sample
from .state import LaneState, Shapes, abstract_kv, abstract_state, described
from .turn import NO_PAGE
from .watermark import Watermark

Params = tuple[Weight, ...]
Kv = tuple[KvLayer, ...]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything the programs are traced from."""

    config: ModelConfig
    graph: DecoderGraph
    kernels: Kernels
    placement: Placement
    shapes: Shapes
    dtype: str
    quantize: Quant | None
    """How weights are stored, if in fewer bits than `dtype` has."""
    kv_dtype: str
    """Of keys and values: `dtype` or int8."""
    decode_rows: tuple[int, ...]
    """Row counts of the decode programs, ascending; the last is the number of lanes."""
    prefill_tokens: tuple[int, ...]
    """Token counts of the prefill programs, ascending."""
    prefill_segments: int
    """Requests that may share one prefill launch."""
    watermark: Watermark


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

    def decode(self, rows: int, params: Params, kv: Kv, state: LaneState, plan: jax.Array, mask: jax.Array):
        """One token for each planned lane, by a mask int32[rows, mask_width] -> (kv, state, int32[rows, RESULT_WIDTH])."""
        return self._compiled[f"decode[{rows}]"](params, kv, state, plan, mask)

    def prefill(
        self, tokens: int, params: Params, kv: Kv, state: LaneState, plan: jax.Array, mask: jax.Array
    ):
        """A chunk of prompts, with a mask int32[segments, mask_width] -> (kv, state, (int32[segments, RESULT_WIDTH],
        int32[tokens, SCORE_WIDTH]))."""
        return self._compiled[f"prefill[{tokens}]"](params, kv, state, plan, mask)


def decode_step(
    blueprint: Blueprint, params: Params, kv: Kv, state: LaneState, packed: jax.Array, mask: jax.Array
):
    """Traced: one token for each lane in the plan."""
    b = blueprint
    # Only the network is split: every device keeps every lane's state by itself, a few numbers.
    plan = b.placement.everywhere(read_decode(packed))
    pages = jnp.where(plan.page == NO_PAGE, b.shapes.table_width, plan.page_index)
    table = state.table.at[plan.lane, pages].set(plan.page, mode="drop")

    def rows(x: jax.Array) -> jax.Array:
        return b.placement.everywhere(x.at[plan.lane].get(mode="clip"))

    active = rows(state.active) & (plan.lane < b.shapes.lanes)
    position = rows(state.position)
    batch = PagedBatch(
        positions=jnp.where(active, position, -1),
        rows=jnp.arange(packed.shape[0], dtype=jnp.int32),
        table=rows(table),
    )
    decoder = b.graph.merge(params)
    token = rows(state.token)
    hidden, kv = decoder(token, batch, kv, b.kernels, b.placement.constrain, one_token_rows=True)
    logits = decoder.logits(hidden, b.kernels)
    sampling = SamplingRows(*map(rows, state.sampling))
    sampled = sample(
        logits, sampling, state.seen, plan.lane, position + 1, token, b.watermark, b.placement, mask
    )
    target = jnp.where(active, plan.lane, b.shapes.lanes)
    # A split here would add up whole rows of `seen`.
    target, sampled = b.placement.everywhere((target, sampled))
    state = state._replace(table=table, seen=state.seen.at[target, sampled.token].add(1, mode="drop"))
    remaining = rows(state.remaining) - 1
    going = ~sampled.broken & (remaining > 0) & ~_stops(sampled.token, sampling.stop)
    state = _advance(state, target, sampled.token, position + 1, remaining, going)
    return kv, state, pack_result(active, sampled)


def prefill_step(
    blueprint: Blueprint,
    tokens: int,
    params: Params,
    kv: Kv,
    state: LaneState,
    packed: jax.Array,
    mask: jax.Array,
):
    """Traced: the prompt tokens of several lanes; lanes whose prompt ends here get their first token."""
    b = blueprint
    plan = b.placement.everywhere(read_prefill(packed, b.prefill_segments, tokens, b.shapes.table_width))
    batch = PagedBatch(positions=plan.positions, rows=plan.rows, table=plan.table)
    decoder = b.graph.merge(params)
    hidden, kv = decoder(plan.tokens, batch, kv, b.kernels, b.placement.constrain, one_token_rows=False)
    logits = decoder.logits(hidden[plan.end], b.kernels)
    seen = _record_prompt(state.seen, plan, b.shapes.lanes)
    previous = plan.tokens[plan.end]
    sampled = sample(
        logits, plan.sampling, seen, plan.lane, plan.length, previous, b.watermark, b.placement, mask
    )
    finishing, sampled = b.placement.everywhere((jnp.where(plan.last, plan.lane, b.shapes.lanes), sampled))
    state = state._replace(
        seen=seen.at[finishing, sampled.token].add(1, mode="drop"),
        table=state.table.at[plan.lane].set(plan.table, mode="drop"),
        sampling=jax.tree.map(
            lambda x, new: x.at[plan.lane].set(new.astype(x.dtype), mode="drop"),
            state.sampling,
            plan.sampling,
        ),
    )
    remaining = plan.remaining - 1
    going = plan.last & ~sampled.broken & (remaining > 0) & ~_stops(sampled.token, plan.sampling.stop)
    state = _advance(state, plan.lane, sampled.token, plan.length, remaining, going)
    scores = prompt_scores(
        hidden,
        plan.targets,
        plan.prompt_top.max(),
        lambda x: decoder.logits(x, b.kernels),
        block_rows(b.shapes.lanes),
        b.placement,
    )
    return kv, state, (pack_result(plan.last & (plan.lane < b.shapes.lanes), sampled), scores)


def _record_prompt(seen: jax.Array, plan: Any, lanes: int) -> jax.Array:
    """Mark prompt tokens, and count those of an output that is computed again, or was forced and not sampled."""
    seen = seen.at[jnp.where(plan.first, plan.lane, lanes)].set(0, mode="drop")
    # Padding has position -1.
    lane = jnp.where(plan.positions >= plan.recorded[plan.rows], plan.lane[plan.rows], lanes)
    from_prompt = plan.positions < plan.prompt_tokens[plan.rows]
    # A lane's prompt comes before its output, so `max` never meets a count it could destroy.
    seen = seen.at[jnp.where(from_prompt, lane, lanes), plan.tokens].max(IN_PROMPT, mode="drop")
    return seen.at[jnp.where(from_prompt, lanes, lane), plan.tokens].add(1, mode="drop")


def _stops(token: jax.Array, stop: jax.Array) -> jax.Array:
    """int32[R], int32[R, E] -> bool[R]: is the token one of the row's stop ids?"""
    return (token[:, None] == stop).any(axis=1)


def _advance(
    state: LaneState,
    lane: jax.Array,
    token: jax.Array,
    position: jax.Array,
    remaining: jax.Array,
    active: jax.Array,
) -> LaneState:
    """Write the lanes' new standing; rows whose lane is out of range are dropped."""
    return state._replace(
        token=state.token.at[lane].set(token, mode="drop"),
        position=state.position.at[lane].set(position, mode="drop"),
        remaining=state.remaining.at[lane].set(remaining, mode="drop"),
        active=state.active.at[lane].set(active, mode="drop"),
    )


def compile_all(blueprint: Blueprint, progress: Callable[[int, int], None] | None = None) -> Programs:
    """Compile every program, smallest first, a few at a time. `progress(done, total)` is called at first and after each."""
    jobs: list[tuple[str, Callable[..., Any], tuple[int, ...], int]] = []
    """Name, what to trace, the plan's shape, the mask's rows."""
    for rows in blueprint.decode_rows:
        jobs.append((f"decode[{rows}]", lambda *a: decode_step(blueprint, *a), (rows, DECODE_WIDTH), rows))
    for tokens in blueprint.prefill_tokens:
        size = prefill_size(blueprint.prefill_segments, tokens, blueprint.shapes.table_width)
        segments = blueprint.prefill_segments
        jobs.append(
            (f"prefill[{tokens}]", lambda *a, t=tokens: prefill_step(blueprint, t, *a), (size,), segments)
        )
    done = 0
    if progress is not None:
        progress(0, len(jobs))
    compiled: dict[str, Any] = {}
    infos: list[ProgramInfo] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        lowered = ((job[0], _lower(blueprint, *job)) for job in jobs)
        futures = [(name, pool.submit(_compile, name, program)) for name, program in lowered]
        for name, future in futures:
            compiled[name], info = future.result()
            infos.append(info)
            done += 1
            if progress is not None:
                progress(done, len(jobs))
    return Programs(blueprint, compiled, tuple(infos))


def _lower(
    blueprint: Blueprint, name: str, step: Callable[..., Any], plan_shape: tuple[int, ...], mask_rows: int
) -> Any:
    """Trace one program. Its inputs and outputs lie where the arrays of the engine lie, so nothing moves at a call."""
    b = blueprint
    params = abstract_params(b.graph.specs, b.placement)
    kv = abstract_kv(b.config, b.shapes, b.kv_dtype, b.placement)
    state = abstract_state(b.shapes, b.placement)
    mask_shape = (mask_rows, mask_width(b.shapes.vocab))
    plan, mask = (described(shape, jnp.int32, b.placement.replicated) for shape in (plan_shape, mask_shape))

    def named(*args: Any) -> Any:
        return step(*args)

    named.__name__ = name.replace("[", "_").rstrip("]")
    shardings = jax.tree.map(lambda a: a.sharding, (kv, state))
    jitted = jax.jit(named, donate_argnums=(1, 2), out_shardings=(*shardings, b.placement.replicated))
    return jitted.lower(params, kv, state, plan, mask)


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


def param_sharding(placement: Placement, spec: ParamSpec) -> jax.sharding.NamedSharding:
    """Where one parameter lies, or one part of a quantised one."""
    return placement.replicated if spec.packed else placement.fitted(spec.axes, spec.shape)
