"""The packed form of one launch: what the host sends (one int32 array) and what comes back (one int32 array).

One small array each way costs one transfer; many small ones cost more than a step's arithmetic. The layouts are written
once here, with the host's writer and the program's reader side by side. Knows no policy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .errors import RequestFailed
from .request import MAX_TOP_LOGPROBS, LogprobsMode, SamplingParams, TokenOutput
from .sampler import LOGPROBS_PROCESSED, LOGPROBS_RAW, Sampled, SamplingRows
from .state import MAX_STOP_IDS
from .turn import Segment

BROKEN = 2
"""In a result's first column: the row's logits held a NaN. 1 is a token, 0 a lane that had ended."""

RESULT_WIDTH = 3 + 2 * MAX_TOP_LOGPROBS
"""Columns of a result row: valid, token, log-probability, alternatives' ids, alternatives' log-probabilities."""


class DecodePlan(NamedTuple):
    """One row per decoding lane."""

    lane: jax.Array
    """int32[b]; `lanes` (one past the last) marks padding."""
    page_index: jax.Array
    """int32[b]: which entry of the lane's table to set, or any if `page` is NO_PAGE."""
    page: jax.Array
    """int32[b]: the page the lane was given for its next token, or NO_PAGE."""


DECODE_WIDTH = len(DecodePlan._fields)


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
    stop: jax.Array
    """int32[S, MAX_STOP_IDS]"""
    sampling: SamplingRows
    table: jax.Array
    """int32[S, Pmax]"""
    tokens: jax.Array
    """int32[T]"""
    rows: jax.Array
    """int32[T]: segment of each token."""
    positions: jax.Array
    """int32[T]; -1 marks padding."""


_INTS = 7
_SAMPLING_INTS = ("top_k", "logprobs", "top_n")
_SAMPLING_FLOATS = ("temperature", "top_p", "min_p", "typical_p", "repetition", "frequency", "presence")
_HEADER = _INTS + MAX_STOP_IDS + 2 + len(_SAMPLING_INTS) + len(_SAMPLING_FLOATS)


def prefill_size(segments: int, tokens: int, table_width: int) -> int:
    """Length of a packed prefill plan."""
    return segments * (_HEADER + table_width) + 3 * tokens


def pack_prefill(plan: list[Segment], segments: int, tokens: int, table_width: int, lanes: int) -> np.ndarray:
    """Write a launch of at most `segments` segments and `tokens` tokens in all."""
    packed = np.zeros(prefill_size(segments, tokens, table_width), np.int32)
    head = packed[: segments * (_HEADER + table_width)].reshape(segments, _HEADER + table_width)
    ids, rows, positions = packed[head.size :].reshape(3, tokens)
    head[:, 0] = lanes
    positions[:] = -1
    at = 0
    for row, segment in enumerate(plan):
        count = len(segment.tokens)
        ids[at : at + count] = segment.tokens
        rows[at : at + count] = row
        positions[at : at + count] = range(segment.start, segment.start + count)
        at += count
        _write_header(head[row], segment, at - 1)
        head[row, _HEADER : _HEADER + len(segment.pages)] = segment.pages
    rows[at:] = max(len(plan) - 1, 0)
    return packed


def _write_header(row: np.ndarray, segment: Segment, end: int) -> None:
    s = segment.sampling
    length = segment.start + len(segment.tokens)
    row[:_INTS] = (
        segment.lane, segment.start == 0, segment.last, end, length, segment.prompt_tokens, segment.remaining,
    )  # fmt: skip
    row[_INTS : _INTS + MAX_STOP_IDS] = -1
    row[_INTS : _INTS + len(s.stop_ids)] = s.stop_ids
    at = _INTS + MAX_STOP_IDS
    row[at : at + 2] = np.array([s.seed >> 32, s.seed & 0xFFFFFFFF], np.uint32).view(np.int32)
    mode = LOGPROBS_PROCESSED if s.logprobs_mode is LogprobsMode.PROCESSED else LOGPROBS_RAW
    row[at + 2 : at + 5] = (min(s.top_k, 2**31 - 1), mode if s.logprobs else 0, s.top_logprobs)
    floats = (
        s.temperature, s.top_p, s.min_p, s.typical_p, s.repetition_penalty, s.frequency_penalty, s.presence_penalty,
    )  # fmt: skip
    row[at + 5 : _HEADER] = np.array(floats, np.float32).view(np.int32)


def read_prefill(packed: jax.Array, segments: int, tokens: int, table_width: int) -> PrefillPlan:
    """The reader of `pack_prefill`, while tracing."""
    split = segments * (_HEADER + table_width)
    head = packed[:split].reshape(segments, _HEADER + table_width)
    ids, rows, positions = packed[split:].reshape(3, tokens)
    lane, first, last, end, length, prompt_tokens, remaining = (head[:, i] for i in range(_INTS))
    at = _INTS + MAX_STOP_IDS
    ints = {name: head[:, at + 2 + i] for i, name in enumerate(_SAMPLING_INTS)}
    bits = jax.lax.bitcast_convert_type(head[:, at + 5 : _HEADER], jnp.float32)
    floats = {name: bits[:, i] for i, name in enumerate(_SAMPLING_FLOATS)}
    seed = jax.lax.bitcast_convert_type(head[:, at : at + 2], jnp.uint32)
    return PrefillPlan(
        lane=lane,
        first=first == 1,
        last=last == 1,
        end=end,
        length=length,
        prompt_tokens=prompt_tokens,
        remaining=remaining,
        stop=head[:, _INTS:at],
        sampling=SamplingRows(seed=seed, **ints, **floats),
        table=head[:, _HEADER:],
        tokens=ids,
        rows=rows,
        positions=positions,
    )


def pack_result(valid: jax.Array, sampled: Sampled) -> jax.Array:
    """int32[R, RESULT_WIDTH], floats by their bits."""

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    return jnp.concatenate(
        [
            jnp.where(sampled.broken, BROKEN, 1)[:, None] * valid.astype(jnp.int32)[:, None],
            sampled.token[:, None],
            bits(sampled.logprob)[:, None],
            sampled.top_ids,
            bits(sampled.top_logprobs),
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
