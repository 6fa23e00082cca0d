"""The packed form of one launch: what the host sends (one int32 array) and what comes back (one int32 array).

One small array each way costs one transfer; many small ones cost more than a step's arithmetic. The layouts are written
once here, with the host's writer and the program's reader side by side. Knows no policy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .errors import RequestFailed
from .request import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, LogprobsMode, SamplingParams, TokenOutput
from .sampler import LOGPROBS_PROCESSED, LOGPROBS_RAW, Sampled, SamplingRows
from .state import MAX_STOP_IDS
from .turn import NO_PAGE, Row, Segment, Size

BROKEN = 2
"""In a result's first column: the row's logits held a NaN. 1 is a token, 0 a lane that had ended."""

RESULT_WIDTH = 3 + 2 * MAX_TOP_LOGPROBS
"""Columns of a result row: valid, token, log-probability, alternatives' ids, alternatives' log-probabilities. With draft
heads, what they guess comes behind these."""


class DecodePlan(NamedTuple):
    """One row per decoding lane, and one for each token that is guessed to follow."""

    lane: jax.Array
    """int32[b]; `lanes` (one past the last) marks padding."""
    page_index: jax.Array
    """int32[b]: which entry of the lane's table to set, or any if `page` is NO_PAGE."""
    page: jax.Array
    """int32[b]: the page the lane was given for this row's token, or NO_PAGE."""
    ahead: jax.Array
    """int32[b]: 0 for a lane's newest token, n for its n-th guess. A lane's rows are adjacent, in this order."""
    guess: jax.Array
    """int32[b]: the guessed token; any where `ahead` is 0."""


DECODE_WIDTH = len(DecodePlan._fields)


def pack_decode(plan: list[Row], rows: int, lanes: int) -> np.ndarray:
    """Write at most `rows` rows -> int32[rows, DECODE_WIDTH]."""
    packed = np.full((rows, DECODE_WIDTH), (lanes, 0, NO_PAGE, 0, 0), np.int32)
    if plan:
        packed[: len(plan)] = plan
    if (packed[:, 2] == NO_PAGE).all():
        packed[:, 1] = 0  # equal plans look equal, so that the one on the device serves again
    return packed


def read_decode(packed: jax.Array) -> DecodePlan:
    """int32[b, DECODE_WIDTH] -> its columns."""
    return DecodePlan(*(packed[:, column] for column in range(DECODE_WIDTH)))


class PrefillPlan(NamedTuple):
    """Device side: S segments and T packed tokens."""

    lane: jax.Array
    """int32[S]; `lanes` marks an unused segment."""
    first: jax.Array
    """bool[S]: the lane starts here; forget what its last user saw."""
    last: jax.Array
    """bool[S]"""
    end: jax.Array
    """int32[S]: index among the packed tokens of the segment's last one."""
    length: jax.Array
    """int32[S]: tokens of the lane in the pool after this launch."""
    prompt_tokens: jax.Array
    """int32[S]"""
    remaining: jax.Array
    """int32[S]"""
    recorded: jax.Array
    """int32[S]: tokens before this position were recorded by an earlier launch."""
    prompt_top: jax.Array
    """int32[S]: alternatives to report with each target."""
    adapter: jax.Array
    """int32[S]: its number from 1 up, 0 for none."""
    sampling: SamplingRows
    table: jax.Array
    """int32[S, Pmax]"""
    tokens: jax.Array
    """int32[T]"""
    rows: jax.Array
    """int32[T]: segment of each token."""
    positions: jax.Array
    """int32[T]; -1 marks padding."""
    targets: jax.Array
    """int32[T]: the token that follows each, where its log-probability is asked for; else -1."""


_HEADER = np.dtype(
    [(name, np.int32) for name in ("lane", "first", "last", "end", "length", "prompt_tokens", "remaining", "recorded", "prompt_top", "adapter")]
    + [("stop", np.int32, (MAX_STOP_IDS,)), ("seed", np.uint32, (2,))]
    + [(name, np.int32) for name in ("stop_from", "watermark", "top_k", "logprobs", "top_n")]
    + [(name, np.float32) for name in ("temperature", "top_p", "min_p", "typical_p", "repetition", "frequency", "presence")]
    + [("bias_ids", np.int32, (MAX_LOGIT_BIAS,)), ("bias", np.float32, (MAX_LOGIT_BIAS,))]
)  # fmt: skip
"""What a segment says of itself, before its pages. Every number is 4 bytes wide; fields of `SamplingRows` have its names."""

_HEADER_WIDTH = _HEADER.itemsize // 4


def prefill_size(segments: int, tokens: int, table_width: int) -> int:
    """Length of a packed prefill plan."""
    return segments * (_HEADER_WIDTH + table_width) + 4 * tokens


def pack_prefill(plan: list[Segment], segments: int, tokens: int, table_width: int, lanes: int) -> np.ndarray:
    """Write a launch of at most `segments` segments and `tokens` tokens in all."""
    packed = np.zeros(prefill_size(segments, tokens, table_width), np.int32)
    head = packed[: segments * (_HEADER_WIDTH + table_width)].reshape(segments, _HEADER_WIDTH + table_width)
    ids, rows, positions, targets = packed[head.size :].reshape(4, tokens)
    head[:, 0] = lanes
    positions[:] = targets[:] = -1
    at = 0
    for row, segment in enumerate(plan):
        count = len(segment.tokens)
        ids[at : at + count] = segment.tokens
        rows[at : at + count] = row
        positions[at : at + count] = range(segment.start, segment.start + count)
        targets[at : at + len(segment.targets)] = segment.targets
        at += count
        _write_header(head[row, :_HEADER_WIDTH].view(_HEADER)[0], segment, at - 1)
        head[row, _HEADER_WIDTH : _HEADER_WIDTH + len(segment.pages)] = segment.pages
    rows[at:] = max(len(plan) - 1, 0)
    return packed


def _write_header(header: np.void, segment: Segment, end: int) -> None:
    s = segment.sampling
    header["lane"] = segment.lane
    header["first"] = segment.start == 0
    header["last"] = segment.last
    header["end"] = end
    header["length"] = segment.start + len(segment.tokens)
    header["prompt_tokens"] = segment.prompt_tokens
    header["remaining"] = segment.remaining
    header["recorded"] = segment.recorded
    header["prompt_top"] = segment.prompt_top
    header["adapter"] = segment.adapter
    header["stop"] = -1
    header["stop"][: len(s.stop_ids)] = s.stop_ids
    header["stop_from"] = min(segment.prompt_tokens + s.min_tokens, 2**31 - 1)
    header["seed"] = (s.seed >> 32, s.seed & 0xFFFFFFFF)
    header["watermark"] = s.watermark
    header["top_k"] = min(s.top_k, 2**31 - 1)
    mode = LOGPROBS_PROCESSED if s.logprobs_mode is LogprobsMode.PROCESSED else LOGPROBS_RAW
    header["logprobs"] = mode if s.logprobs else 0
    header["top_n"] = s.top_logprobs
    header["temperature"] = s.temperature
    header["top_p"] = s.top_p
    header["min_p"] = s.min_p
    header["typical_p"] = s.typical_p
    header["repetition"] = s.repetition_penalty
    header["frequency"] = s.frequency_penalty
    header["presence"] = s.presence_penalty
    if s.logit_bias:
        count = len(s.logit_bias)
        header["bias_ids"][:count], header["bias"][:count] = zip(*s.logit_bias)


def read_prefill(packed: jax.Array, segments: int, tokens: int, table_width: int) -> PrefillPlan:
    """The reader of `pack_prefill`, while tracing."""
    split = segments * (_HEADER_WIDTH + table_width)
    head = packed[:split].reshape(segments, _HEADER_WIDTH + table_width)
    ids, rows, positions, targets = packed[split:].reshape(4, tokens)
    fields = _read_header(head)
    sampling = SamplingRows(**{name: fields.pop(name) for name in SamplingRows._fields})
    fields |= {name: fields[name] == 1 for name in ("first", "last")}
    return PrefillPlan(
        **fields,
        sampling=sampling,
        table=head[:, _HEADER_WIDTH:],
        tokens=ids,
        rows=rows,
        positions=positions,
        targets=targets,
    )


def _read_header(head: jax.Array) -> dict[str, jax.Array]:
    """int32[S, …] -> each field's [S] or [S, n]."""
    fields: dict[str, jax.Array] = {}
    for name, (dtype, offset, *_) in (_HEADER.fields or {}).items():
        columns = head[:, offset // 4 : (offset + dtype.itemsize) // 4]
        values = jax.lax.bitcast_convert_type(columns, dtype.base)
        fields[name] = values if dtype.shape else values[:, 0]
    return fields


def plan_size(size: Size, segments: int, table_width: int) -> int:
    """Length of the packed plan of a launch."""
    return size.rows * DECODE_WIDTH + bool(size.tokens) * prefill_size(segments, size.tokens, table_width)


def pack_plan(
    rows: list[Row],
    plan: list[Segment],
    size: Size,
    segments: int,
    table_width: int,
    lanes: int,
) -> np.ndarray:
    """Write a launch: what decodes, then the pieces of prompts -> int32[plan_size]."""
    decode = pack_decode(rows, size.rows, lanes).reshape(-1) if size.rows else np.empty(0, np.int32)
    if not size.tokens:
        return decode
    return np.concatenate([decode, pack_prefill(plan, segments, size.tokens, table_width, lanes)])


def read_plan(
    packed: jax.Array, size: Size, segments: int, table_width: int
) -> tuple[DecodePlan | None, PrefillPlan | None]:
    """The reader of `pack_plan`, while tracing; None for what a program of this size does not do."""
    split = size.rows * DECODE_WIDTH
    decode = read_decode(packed[:split].reshape(size.rows, DECODE_WIDTH)) if size.rows else None
    return decode, read_prefill(packed[split:], segments, size.tokens, table_width) if size.tokens else None


def pack_result(valid: jax.Array, sampled: Sampled, guesses: jax.Array | None = None) -> jax.Array:
    """int32[R, RESULT_WIDTH] and the columns of `guesses` int32[R, K], floats by their bits."""

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    return jnp.concatenate(
        [
            jnp.where(sampled.broken, BROKEN, 1)[:, None] * valid.astype(jnp.int32)[:, None],
            sampled.token[:, None],
            bits(sampled.logprob)[:, None],
            sampled.top_ids,
            bits(sampled.top_logprobs),
            *(() if guesses is None else (guesses,)),
        ],
        axis=1,
    )


def read_result(row: np.ndarray, sampling: SamplingParams) -> TokenOutput | RequestFailed | None:
    """One row of a result on the host; None if its lane had already ended when it was launched, an error if the model
    gave no usable distribution."""
    if not row[0]:
        return None
    if row[0] == BROKEN:
        return RequestFailed(
            "the model's output for this request is not a number (NaN); its weights may be damaged"
        )
    if not sampling.logprobs:
        return TokenOutput(int(row[1]))
    ids = row[3 : 3 + sampling.top_logprobs].tolist()
    at = 3 + MAX_TOP_LOGPROBS
    values = row[at : at + sampling.top_logprobs].view(np.float32).tolist()
    return TokenOutput(int(row[1]), float(row[2:3].view(np.float32)[0]), tuple(zip(ids, values)))


def read_scores(rows: np.ndarray, targets: tuple[int, ...], alternatives: int) -> list[TokenOutput]:
    """int32[n, SCORE_WIDTH] of a segment's tokens on the host -> an output for each of its targets, in order."""
    values = rows.view(np.float32)
    ids, tops = rows[:, 1 : 1 + alternatives].tolist(), values[:, 1 + MAX_TOP_LOGPROBS :].tolist()
    return [
        TokenOutput(target, float(value), tuple(zip(ids[row], tops[row])))
        for row, (target, value) in enumerate(zip(targets, values[:, 0]))
        if target >= 0
    ]
