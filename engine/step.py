"""One launch, traced: lanes get their next token, and pieces of prompts are computed beside them.

Both go through the network together, so that its weights are read once for all. Token ids in, token ids out. Knows no
policy and no requests, and not for which sizes it is compiled.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models.config import ModelConfig
from ..models.decoder import DecoderGraph
from ..models.draft_heads import Heads, HeadsShape
from ..models.kernels import Kernels, KvLayer, PagedBatch, Weight
from ..models.modules import Style
from ..models.spec import ParamSpec, Quant
from ..sharding.mesh import Placement
from .batch import DecodePlan, PrefillPlan, pack_result, read_plan
from .draft import NO_GUESS, WORTH
from .prompt_scores import block_rows, prompt_scores
from .sampler import IN_PROMPT, SamplingRows, sample
from .state import LaneState, Shapes
from .turn import NO_PAGE, Size
from .watermark import Watermark

Params = tuple[Weight, ...]
"""The decoder's parameters, then those of its draft heads, if it has any."""
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
    sizes: tuple[Size, ...]
    """What is compiled, smallest first."""
    prefill_segments: int
    """Requests that may share the prompt tokens of a launch."""
    watermark: Watermark
    heads: HeadsShape | None = None
    """Of the draft heads, if there are any."""

    @property
    def head_specs(self) -> tuple[ParamSpec, ...]:
        """The draft heads' weights; behind them come the tokens that they can guess."""
        style = Style(self.dtype, self.kernels.packed)
        return () if self.heads is None else self.heads.specs(style)

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens of the largest launch."""
        return max(size.tokens for size in self.sizes)

    def segments(self, size: Size) -> int:
        """Pieces of prompts that a launch of this size has room for."""
        return size.segments(self.prefill_segments)


class _Part(NamedTuple):
    """What one kind of work brings to a launch: n tokens of r rows, and what is sampled after them."""

    tokens: jax.Array
    """int32[n]"""
    batch: PagedBatch
    end: jax.Array
    """int32[r]: which of the n tokens is a row's last."""
    lane: jax.Array
    """int32[r]; `lanes` where nothing is to be kept."""
    samples: jax.Array
    """bool[r]: the row gets a token, not just its keys and values."""
    length: jax.Array
    """int32[r]: tokens of the lane in the pool after this launch."""
    remaining: jax.Array
    """int32[r]: tokens the lane may still generate, this one included."""
    sampling: SamplingRows
    adapter: jax.Array | None
    """int32[n]: of each token; None where there are no adapters."""


def step(
    blueprint: Blueprint,
    size: Size,
    params: Params,
    kv: Kv,
    state: LaneState,
    packed: jax.Array,
    mask: jax.Array,
) -> tuple[Kv, LaneState, tuple[jax.Array, jax.Array | None]]:
    """Traced: packed int32[plan_size], mask int32[R, mask_width] -> (kv, state, (int32[R, RESULT_WIDTH], scores)).

    A lane that decodes gets a token, and one more for each of its guesses that is what was sampled before it: every row is
    sampled with the key of its own position, so the tokens that count are those that one step after another would have
    sampled. What rows of wrong guesses left in the pool is written over before anybody may look at it. Beside prompts nobody
    guesses. The R rows are those that decode, then the pieces of prompts; each has what the draft heads guess behind its result. scores int32[tokens, SCORE_WIDTH], None without prompts.
    """
    b, segments = blueprint, blueprint.segments(size)
    decode, prompts = b.placement.everywhere(read_plan(packed, size, segments, b.shapes.table_width))
    parts: list[_Part] = []
    if decode is not None:
        state, part = _decoding(b, decode, state)
        parts.append(part)
    if prompts is not None:
        # Sampling looks at what was seen, so a prompt is noted before.
        state = state._replace(seen=_record_prompt(state.seen, prompts, b.shapes.lanes))
        parts.append(_prompting(b, prompts, state))
    whole = _join(parts)
    decoder = b.graph.merge(params[: len(b.graph.specs)])
    hidden, kv = decoder(
        whole.tokens,
        whole.batch,
        kv,
        b.kernels,
        b.placement.constrain,
        one_token_rows=size.rows,
        adapters=whole.adapter,
    )
    # A decode alone samples after every token it has.
    read = hidden if prompts is None else hidden[whole.end]
    read = jnp.where(whole.samples[:, None], read, 0)  # kernels on CPUs compute nothing for zeros
    logits = decoder.logits(read, b.kernels)
    previous = whole.tokens[whole.end]
    sampled = sample(
        logits, whole.sampling, state.seen, whole.lane, whole.length, previous, b.watermark, b.placement, mask,
        b.kernels.argmax,
    )  # fmt: skip
    remaining = whole.remaining - 1
    going = whole.samples & ~sampled.broken & (remaining > 0) & ~_stops(sampled.token, whole.sampling.stop)
    samples, newest = whole.samples & (whole.lane < b.shapes.lanes), whole.lane
    if decode is not None and prompts is None:
        samples &= _confirmed(decode, going, sampled.token)
        followed = jnp.roll(samples & (decode.ahead > 0), -1)
        newest = b.placement.everywhere(jnp.where(samples & ~followed, whole.lane, b.shapes.lanes))
    # A split here would add up whole rows of `seen`.
    target, sampled = b.placement.everywhere((jnp.where(samples, whole.lane, b.shapes.lanes), sampled))
    state = state._replace(seen=state.seen.at[target, sampled.token].add(1, mode="drop"))
    state = _advance(state, newest, sampled.token, whole.length, remaining, going)
    scores = None
    if prompts is not None:
        state = _take_in(state, prompts)
        scores = prompt_scores(
            hidden[size.rows :],
            prompts.targets,
            prompts.prompt_top.max(),
            lambda x: decoder.logits(x, b.kernels),
            block_rows(b.shapes.lanes),
            b.placement,
        )
    guesses = None
    if b.heads is not None:
        heads = Heads.of(params[len(b.graph.specs) :])
        state_read = b.placement.everywhere(read)
        scale = b.config.logits_scale
        offered, sure = heads.guess(state_read, sampled.token, decoder.embed, b.heads.inner, scale, b.kernels)
        # What is right less often than it costs is not worth a row.
        guesses = jnp.where(sure.sum(axis=1, keepdims=True) < WORTH, NO_GUESS, offered)
    return kv, state, (pack_result(samples, sampled, guesses), scores)


def _confirmed(plan: DecodePlan, going: jax.Array, token: jax.Array) -> jax.Array:
    """bool[R]: is every guess of the lane up to this row's own what the row before it sampled, and did that not end it?"""
    right = (plan.ahead == 0) | (jnp.roll(going, 1) & (jnp.roll(token, 1) == plan.guess))
    row = jnp.arange(plan.lane.shape[0], dtype=jnp.int32)
    of_lane = (row[None, :] <= row[:, None]) & (row[None, :] >= (row - plan.ahead)[:, None])
    return (right[None, :] | ~of_lane).all(axis=1)


def _decoding(b: Blueprint, plan: DecodePlan, state: LaneState) -> tuple[LaneState, _Part]:
    """The newest token of each planned lane; those that ended on the device meanwhile do nothing."""
    pages = jnp.where(plan.page == NO_PAGE, b.shapes.table_width, plan.page_index)
    state = state._replace(table=state.table.at[plan.lane, pages].set(plan.page, mode="drop"))

    def rows(x: jax.Array) -> jax.Array:
        return b.placement.everywhere(x.at[plan.lane].get(mode="clip"))

    active = rows(state.active) & (plan.lane < b.shapes.lanes)
    position = rows(state.position) + plan.ahead
    each = jnp.arange(plan.lane.shape[0], dtype=jnp.int32)
    return state, _Part(
        tokens=jnp.where(plan.ahead > 0, plan.guess, rows(state.token)),
        batch=PagedBatch(
            positions=jnp.where(active, position, -1), rows=each - plan.ahead, table=rows(state.table)
        ),
        end=each,
        lane=jnp.where(active, plan.lane, b.shapes.lanes),
        samples=active,
        length=position + 1,
        remaining=rows(state.remaining) - plan.ahead,
        sampling=SamplingRows(*map(rows, state.sampling)),
        adapter=None if state.adapter is None else rows(state.adapter),
    )


def _prompting(b: Blueprint, plan: PrefillPlan, state: LaneState) -> _Part:
    """The tokens of prompts; lanes whose prompt ends here get their first token."""
    return _Part(
        tokens=plan.tokens,
        batch=PagedBatch(positions=plan.positions, rows=plan.rows, table=plan.table),
        end=plan.end,
        lane=plan.lane,
        samples=plan.last,
        length=plan.length,
        remaining=plan.remaining,
        sampling=jax.tree.map(lambda new, x: new.astype(x.dtype), plan.sampling, state.sampling),
        adapter=None if state.adapter is None else plan.adapter[plan.rows],
    )


def _join(parts: list[_Part]) -> _Part:
    """All parts as one, in order."""
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    tokens, rows = first.tokens.shape[0], first.lane.shape[0]
    shifted = second._replace(
        end=second.end + tokens, batch=second.batch._replace(rows=second.batch.rows + rows)
    )
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, shifted)


def _take_in(state: LaneState, plan: PrefillPlan) -> LaneState:
    """Keep for the lanes of prompts what decoding asks of them."""
    return state._replace(
        table=state.table.at[plan.lane].set(plan.table, mode="drop"),
        sampling=jax.tree.map(
            lambda x, new: x.at[plan.lane].set(new.astype(x.dtype), mode="drop"),
            state.sampling,
            plan.sampling,
        ),
        adapter=None if state.adapter is None else state.adapter.at[plan.lane].set(plan.adapter, mode="drop"),
    )


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
