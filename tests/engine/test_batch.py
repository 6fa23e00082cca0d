"""What the host packs is what the program reads, bit for bit, and the other way round."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xlane.engine import LogprobsMode, RequestFailed, SamplingParams
from xlane.engine.batch import (
    DECODE_WIDTH,
    RESULT_WIDTH,
    pack_prefill,
    pack_result,
    prefill_size,
    read_decode,
    read_prefill,
    read_result,
)
from xlane.engine.request import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS
from xlane.engine.sampler import LOGPROBS_PROCESSED, LOGPROBS_RAW, Sampled
from xlane.engine.state import MAX_STOP_IDS
from xlane.engine.turn import Segment

SEGMENTS, TOKENS, WIDTH, LANES = 4, 16, 6, 5

read = jax.jit(lambda packed: read_prefill(packed, SEGMENTS, TOKENS, WIDTH))

floats = st.floats(width=32, allow_nan=False)
int31 = st.integers(0, 2**31 - 1)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """Anything the fields hold, in range or not: packing keeps bits and judges nothing."""
    logprobs = draw(st.booleans())
    return SamplingParams(
        max_tokens=1,
        temperature=draw(floats),
        top_k=draw(int31),
        top_p=draw(floats),
        min_p=draw(floats),
        typical_p=draw(floats),
        repetition_penalty=draw(floats),
        frequency_penalty=draw(floats),
        presence_penalty=draw(floats),
        seed=draw(st.integers(0, 2**64 - 1) | st.sampled_from([2**64 - 1, 2**63, 2**32, 2**32 - 1, 2**31])),
        stop_ids=tuple(draw(st.lists(int31, max_size=MAX_STOP_IDS))),
        logprobs=logprobs,
        top_logprobs=draw(st.integers(0, MAX_TOP_LOGPROBS)) if logprobs else 0,
        logprobs_mode=draw(st.sampled_from(LogprobsMode)),
        min_tokens=draw(int31),
        watermark=draw(st.booleans()),
        logit_bias=tuple(draw(st.lists(st.tuples(int31, floats), max_size=MAX_LOGIT_BIAS))),
    )


@st.composite
def plans(draw: st.DrawFn) -> list[Segment]:
    left, segments = TOKENS, []
    lanes = draw(st.permutations(range(LANES)))
    for lane in lanes[: draw(st.integers(0, SEGMENTS))]:
        if left == 0:
            break
        tokens = draw(st.lists(int31, min_size=1, max_size=left))
        left -= len(tokens)
        segments.append(
            Segment(
                lane=lane,
                tokens=tokens,
                start=draw(st.sampled_from([0, 1, 7])),
                last=draw(st.booleans()),
                prompt_tokens=draw(int31),
                remaining=draw(int31),
                pages=draw(st.lists(int31, min_size=1, max_size=WIDTH)),
                sampling=draw(sampling_params()),
                targets=draw(st.just(()) | st.just((*tokens[1:], -1))),
                prompt_top=draw(st.integers(0, MAX_TOP_LOGPROBS)),
            )
        )
    return segments


@settings(max_examples=60, deadline=None)
@given(plans())
def test_a_prefill_plan_is_read_as_it_was_written(plan: list[Segment]) -> None:
    packed = pack_prefill(plan, SEGMENTS, TOKENS, WIDTH, LANES)
    assert packed.shape == (prefill_size(SEGMENTS, TOKENS, WIDTH),)
    got = jax.tree.map(np.asarray, read(jnp.array(packed)))
    used = len(plan)
    assert got.lane.tolist() == [s.lane for s in plan] + [LANES] * (SEGMENTS - used)
    assert got.tokens.tolist()[: sum(len(s.tokens) for s in plan)] == [t for s in plan for t in s.tokens]
    at = 0
    for row, segment in enumerate(plan):
        count, s = len(segment.tokens), segment.sampling
        assert got.rows[at : at + count].tolist() == [row] * count
        assert got.positions[at : at + count].tolist() == list(range(segment.start, segment.start + count))
        targets = [*segment.targets, *[-1] * (count - len(segment.targets))]
        assert got.targets[at : at + count].tolist() == targets
        assert got.prompt_top[row] == segment.prompt_top
        at += count
        assert (bool(got.first[row]), bool(got.last[row])) == (segment.start == 0, segment.last)
        assert (got.end[row], got.length[row]) == (at - 1, segment.start + count)
        assert (got.prompt_tokens[row], got.remaining[row]) == (segment.prompt_tokens, segment.remaining)
        assert got.sampling.stop[row].tolist() == [*s.stop_ids, *[-1] * (MAX_STOP_IDS - len(s.stop_ids))]
        assert got.table[row].tolist() == [*segment.pages, *[0] * (WIDTH - len(segment.pages))]
        high, low = map(int, got.sampling.seed[row])
        assert high << 32 | low == s.seed
        mode = LOGPROBS_PROCESSED if s.logprobs_mode is LogprobsMode.PROCESSED else LOGPROBS_RAW
        assert (got.sampling.logprobs[row], got.sampling.top_n[row]) == (
            mode if s.logprobs else 0,
            s.top_logprobs,
        )
        assert got.sampling.top_k[row] == s.top_k
        wanted = (s.temperature, s.top_p, s.min_p, s.typical_p, s.repetition_penalty, s.frequency_penalty, s.presence_penalty)  # fmt: skip
        r = got.sampling
        ours = (r.temperature, r.top_p, r.min_p, r.typical_p, r.repetition, r.frequency, r.presence)
        assert np.array([x[row] for x in ours]).tobytes() == np.array(wanted, np.float32).tobytes()
        assert got.sampling.watermark[row] == s.watermark
        assert got.sampling.stop_from[row] == min(segment.prompt_tokens + s.min_tokens, 2**31 - 1)
        bias = np.array([value for _, value in s.logit_bias], np.float32)
        assert got.sampling.bias_ids[row, : len(bias)].tolist() == [token for token, _ in s.logit_bias]
        assert got.sampling.bias[row, : len(bias)].tobytes() == bias.tobytes()
        assert not got.sampling.bias[row, len(bias) :].any()
    assert (got.positions[at:] == -1).all()
    assert (got.targets[at:] == -1).all()
    assert (np.diff(got.rows) >= 0).all()  # kernels walk rows in order


def test_a_top_k_beyond_int32_is_all() -> None:
    segment = Segment(0, [1], 0, True, 1, 1, [0], SamplingParams(max_tokens=1, top_k=2**40))
    got = read(jnp.array(pack_prefill([segment], SEGMENTS, TOKENS, WIDTH, LANES)))
    assert int(got.sampling.top_k[0]) == 2**31 - 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    floats,
    st.lists(st.tuples(int31, floats), min_size=MAX_TOP_LOGPROBS, max_size=MAX_TOP_LOGPROBS),
    st.integers(0, MAX_TOP_LOGPROBS),
    st.booleans(),
)
def test_a_result_is_read_as_it_was_written(
    token: int, logprob: float, top: list[tuple[int, float]], n: int, valid: bool
) -> None:
    ids, values = zip(*top)
    one = Sampled(
        jnp.array([token], jnp.int32),
        jnp.array([False]),
        jnp.array([logprob], jnp.float32),
        jnp.array([ids], jnp.int32),
        jnp.array([values], jnp.float32),
    )
    broken = np.asarray(pack_result(jnp.array([valid]), one._replace(broken=jnp.array([True]))))
    assert isinstance(
        read_result(broken[0], SamplingParams(max_tokens=1)), RequestFailed if valid else type(None)
    )
    packed = np.asarray(pack_result(jnp.array([valid]), one))
    assert packed.shape == (1, RESULT_WIDTH)
    asked = SamplingParams(max_tokens=1, logprobs=True, top_logprobs=n)
    got = read_result(packed[0], asked)
    if not valid:
        assert got is None
        return
    assert got is not None
    assert got.id == token
    assert np.float32(got.logprob).tobytes() == np.float32(logprob).tobytes()
    assert [i for i, _ in got.top] == list(ids[:n])
    assert (
        np.array([v for _, v in got.top], np.float32).tobytes() == np.array(values[:n], np.float32).tobytes()
    )
    unasked = read_result(packed[0], SamplingParams(max_tokens=1))
    assert unasked is not None
    assert (unasked.id, unasked.logprob, unasked.top) == (token, None, ())


def test_a_decode_plan_is_its_columns() -> None:
    plan = read_decode(jnp.arange(2 * DECODE_WIDTH, dtype=jnp.int32).reshape(2, DECODE_WIDTH))
    assert [column.tolist() for column in plan] == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]
