"""The compiled programs one by one: what they alias, what they leave alone, what they remember of a sequence."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import reference
from tests.support.untrained import KV_BYTES_PER_TOKEN, VOCAB, loud, untrained_model
from xlane.engine import EngineConfig, LogprobsMode, SamplingParams, TokenOutput
from xlane.engine.batch import pack_plan, plan_size, read_result
from xlane.engine.build import design
from xlane.engine.programs import Programs, compile_all, param_sharding
from xlane.engine.sampler import mask_width
from xlane.engine.state import LaneState, abstract_kv, abstract_state, zeros_like
from xlane.engine.turn import NO_PAGE, Row, Segment, Size
from xlane.models.attention import XlaKernels
from xlane.models.kernels import KvLayer, PagedBatch
from xlane.models.loader import dummy_params
from xlane.models.opened import open_model

LANES, PAGE, MOST = 3, 4, 32
PROMPT = [3, 3, 7, 0, 11, 18, 5, 5, 5, 1, 12, 9, 3, 16, 2, 2, 8, 14]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
PENALISED = SamplingParams(
    max_tokens=8, temperature=0.8, seed=5, repetition_penalty=1.5, frequency_penalty=0.6, presence_penalty=-0.4,
    logprobs=True, top_logprobs=VOCAB, logprobs_mode=LogprobsMode.PROCESSED,
)  # fmt: skip


@pytest.fixture(scope="module")
def blueprint(tmp_path_factory: pytest.TempPathFactory):
    model = open_model(untrained_model(tmp_path_factory.mktemp("untrained")), weights=False).config
    config = EngineConfig(
        model_id="m",
        kernels="xla",
        lanes=LANES,
        page_tokens=PAGE,
        max_total_tokens=MOST,
        prefill_chunk_tokens=32,
    )
    decided = design(config, model)[0]
    # To put the same work into programs of several kinds and sizes.
    mixed = [Size(rows, 16) for rows in (1, LANES)]
    return replace(decided, sizes=(*(Size(n, 0) for n in (1, 2, LANES)), Size(0, 16), Size(0, 32), *mixed))


@pytest.fixture(scope="module")
def programs(blueprint) -> Programs:
    return compile_all(blueprint)


@pytest.fixture(scope="module")
def params(blueprint) -> tuple[jax.Array, ...]:
    return loud(dummy_params(blueprint.graph.specs, lambda spec: param_sharding(blueprint.placement, spec)))


class Device:
    """Programs with their state, driven by hand. Lane n may use pages 8n … 8n+7, in odd order."""

    def __init__(self, programs: Programs, params: tuple[jax.Array, ...]) -> None:
        b = self.blueprint = programs.blueprint
        self.programs, self.params = programs, params
        self.kv = zeros_like(abstract_kv(b.config, b.shapes, b.dtype, b.placement))
        self.state: LaneState = zeros_like(abstract_state(b.shapes, b.placement))

    def pages(self, lane: int, tokens: int) -> list[int]:
        return [8 * lane + (3 * index + 1) % 8 for index in range(-(-tokens // PAGE))]

    def segment(
        self,
        lane: int,
        tokens: Sequence[int],
        start: int,
        *,
        last: bool,
        prompt: int,
        sampling: SamplingParams = GREEDY,
    ) -> Segment:
        end = start + len(tokens)
        remaining = sampling.max_tokens - max(0, end - prompt)
        return Segment(lane, list(tokens), start, last, prompt, remaining, self.pages(lane, end), sampling)

    def prefill(
        self, *segments: Segment, size: int = 32, masks: dict[int, np.ndarray] | None = None
    ) -> list[TokenOutput | None]:
        return self.mixed([], segments, Size(0, size), masks=masks)

    def decode(
        self,
        *lanes: int,
        size: int = LANES,
        sampling: SamplingParams = GREEDY,
        masks: dict[int, np.ndarray] | None = None,
    ) -> list[TokenOutput | None]:
        return self.mixed(lanes, [], Size(size, 0), sampling, masks)

    def mixed(
        self,
        lanes: Sequence[int],
        segments: Sequence[Segment],
        size: Size,
        sampling: SamplingParams = GREEDY,
        masks: dict[int, np.ndarray] | None = None,
    ) -> list[TokenOutput | None]:
        """One launch: a result for each lane, then for each segment."""
        b = self.blueprint
        rows = []
        for lane in lanes:
            at = int(self.state.position[lane])
            rows.append(Row(lane, at // PAGE, self.pages(lane, at + 1)[-1] if at % PAGE == 0 else NO_PAGE))
        packed = pack_plan(rows, list(segments), size, b.segments(size), b.shapes.table_width, LANES)
        self.kv, self.state, (result, self.scores) = self.programs(
            size,
            self.params,
            self.kv,
            self.state,
            jnp.array(packed),
            self.masks(size.rows + b.segments(size), masks),
        )
        made = np.asarray(result)
        decoded, prompts = made[: size.rows], made[size.rows :]
        assert not decoded[len(lanes) :, 0].any()
        assert not prompts[len(segments) :, 0].any()
        return [
            *(read_result(row, sampling) for row in decoded[: len(lanes)]),
            *(read_result(row, segment.sampling) for row, segment in zip(prompts, segments)),
        ]

    def masks(self, rows: int, given: dict[int, np.ndarray] | None) -> jax.Array:
        """Of the rows that have one."""
        packed = np.zeros((rows, mask_width(VOCAB)), np.int32)
        for row, mask in (given or {}).items():
            packed[row] = (1, *mask)
        return jnp.array(packed)

    def snapshot(self) -> Any:
        return jax.tree.map(np.array, (self.kv, self.state))


@pytest.fixture
def device(programs: Programs, params: tuple[jax.Array, ...]) -> Device:
    return Device(programs, params)


@pytest.fixture(scope="module")
def logits_after(blueprint, params: tuple[jax.Array, ...]):
    """The network alone: a whole text in one row over fresh pages, nothing of engine state."""
    shapes = blueprint.shapes._replace(pages=MOST // PAGE)

    @jax.jit
    def run(tokens: jax.Array, count: jax.Array) -> jax.Array:
        kv = tuple(
            KvLayer(jnp.zeros(a.k.shape, a.k.dtype), jnp.zeros(a.v.shape, a.v.dtype))
            for a in abstract_kv(blueprint.config, shapes, blueprint.dtype, blueprint.placement)
        )
        at = jnp.arange(MOST, dtype=jnp.int32)
        batch = PagedBatch(jnp.where(at < count, at, -1), jnp.zeros(MOST, jnp.int32), jnp.arange(MOST // PAGE, dtype=jnp.int32)[None])  # fmt: skip
        decoder, kernels = blueprint.graph.merge(params), XlaKernels("cpu")
        hidden, _ = decoder(tokens, batch, kv, kernels, blueprint.placement.constrain, one_token_rows=0)
        return decoder.logits(hidden[count - 1][None], kernels)[0]

    def ask(context: Sequence[int]) -> np.ndarray:
        padded = jnp.array([*context, *[0] * (MOST - len(context))], jnp.int32)
        return np.asarray(run(padded, jnp.int32(len(context))))

    return ask


def tokens_of(outputs: Sequence[TokenOutput | None]) -> list[int]:
    return [one.id for one in outputs if one is not None]


def test_kv_and_state_are_updated_in_place(programs: Programs) -> None:
    """Every byte of both is aliased, so a launch holds no second copy of either."""
    b = programs.blueprint
    state = abstract_state(b.shapes, b.placement)
    state_bytes = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))
    kv_bytes = b.shapes.pages * PAGE * KV_BYTES_PER_TOKEN
    assert {info.name for info in programs.infos} == {
        "decode[1]",
        "decode[2]",
        "decode[3]",
        "prefill[16]",
        "prefill[32]",
        "mixed[1+16]",
        "mixed[3+16]",
    }
    assert {info.alias_bytes for info in programs.infos} == {kv_bytes + state_bytes}
    for info in programs.infos:
        assert info.argument_bytes > info.alias_bytes
        assert info.flops > 0


def test_temporaries_do_not_grow_with_the_pool(blueprint, programs: Programs) -> None:
    large = blueprint.shapes._replace(pages=64 * blueprint.shapes.pages)
    few = replace(blueprint, shapes=large, sizes=(Size(LANES, 0), Size(0, 16), Size(LANES, 16)))
    before = {info.name: info.temp_bytes for info in programs.infos}
    for info in compile_all(few).infos:
        assert info.temp_bytes <= before[info.name] * 1.02 + 1024
        assert info.temp_bytes < large.pages * PAGE * KV_BYTES_PER_TOKEN / 4


def test_no_program_sorts(programs: Programs) -> None:
    for name, compiled in programs._compiled.items():
        assert not re.search(r" sort\(| topk\(|TopK", compiled.as_text()), name


def test_a_shape_that_was_not_compiled_is_refused(device: Device) -> None:
    with pytest.raises(KeyError):
        device.decode(0, size=4)
    plan = jnp.zeros(plan_size(Size(3, 0), 0, MOST // PAGE), jnp.int32)
    with pytest.raises(TypeError):
        device.programs(Size(2, 0), device.params, device.kv, device.state, plan, device.masks(2, None))


def test_rows_that_are_inactive_or_padding_write_nothing(device: Device) -> None:
    device.prefill(
        device.segment(0, PROMPT[:6], 0, last=True, prompt=6, sampling=replace(GREEDY, max_tokens=1))
    )
    device.prefill(device.segment(1, PROMPT[:5], 0, last=False, prompt=9))
    before = device.snapshot()
    # Lane 0 has ended, lane 1 is in the middle of its prompt, lane 2 was never used, the rest is padding.
    assert device.decode(0, 1, 2) == [None, None, None]
    jax.tree.map(np.testing.assert_array_equal, device.snapshot()[0], before[0])
    after, before = device.snapshot()[1], before[1]
    for name in LaneState._fields:
        if name != "table":
            jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def test_an_active_row_writes_its_own_slot_and_no_other(device: Device) -> None:
    device.prefill(
        *(device.segment(lane, PROMPT[: 5 + lane], 0, last=True, prompt=5 + lane) for lane in range(LANES))
    )
    before = device.snapshot()
    device.decode(1, size=1)
    after = device.snapshot()
    page, slot = device.pages(1, 7)[6 // PAGE], 6 % PAGE
    for old, new in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after[0])):
        changed = np.argwhere((old != new).any(axis=(0, 3)))
        assert changed.tolist() == [[page, slot]]
    for old, new in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1])):
        np.testing.assert_array_equal(old[[0, 2]], new[[0, 2]])


@pytest.mark.parametrize("cuts", [(16,), (4, 8), (1, 2, 3), (15,), tuple(range(1, 18))])
def test_a_prompt_in_chunks_is_a_prompt_in_one(
    programs: Programs, params: tuple[jax.Array, ...], cuts: tuple[int, ...]
) -> None:
    whole, parts = Device(programs, params), Device(programs, params)
    expected = whole.prefill(whole.segment(1, PROMPT, 0, last=True, prompt=len(PROMPT), sampling=PENALISED))
    got: list[TokenOutput | None] = []
    for start, end in itertools.pairwise((0, *cuts, len(PROMPT))):
        last = end == len(PROMPT)
        got = parts.prefill(
            parts.segment(1, PROMPT[start:end], start, last=last, prompt=len(PROMPT), sampling=PENALISED),
            size=16,
        )
        assert (got != [None]) == last
    assert tokens_of(got) == tokens_of(expected)
    (kv, state), (other_kv, other_state) = whole.snapshot(), parts.snapshot()
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kv, other_kv)


def test_packed_prompts_equal_prompts_alone(programs: Programs, params: tuple[jax.Array, ...]) -> None:
    packed = Device(programs, params)
    prompts = {2: PROMPT[:7], 0: PROMPT[3:12], 1: PROMPT[9:]}
    together = packed.prefill(
        *(packed.segment(lane, p, 0, last=True, prompt=len(p)) for lane, p in prompts.items())
    )
    for lane, prompt in prompts.items():
        alone = Device(programs, params)
        (one,) = alone.prefill(alone.segment(lane, prompt, 0, last=True, prompt=len(prompt)))
        assert one == together[list(prompts).index(lane)]
        np.testing.assert_array_equal(packed.state.seen[lane], alone.state.seen[lane])
        assert int(packed.state.position[lane]) == len(prompt)


@pytest.mark.parametrize("sampling", [GREEDY, PENALISED])
@pytest.mark.parametrize("cut", [None, 11])
def test_a_launch_of_both_kinds_does_what_two_launches_do(
    programs: Programs, params: tuple[jax.Array, ...], sampling: SamplingParams, cut: int | None
) -> None:
    """Lanes 0 and 2 decode while the prompt of lane 1 comes in, at once or in two pieces; lane 2 had ended."""

    def begun() -> Device:
        device = Device(programs, params)
        device.prefill(device.segment(0, PROMPT[:6], 0, last=True, prompt=6, sampling=sampling))
        ended = replace(sampling, max_tokens=1)
        device.prefill(device.segment(2, PROMPT[:5], 0, last=True, prompt=5, sampling=ended))
        return device

    apart, together = begun(), begun()
    cuts = [0, *([cut] if cut else []), 16]
    for start, end in itertools.pairwise(cuts):
        segment = apart.segment(1, PROMPT[start:end], start, last=end == 16, prompt=16, sampling=sampling)
        first = apart.decode(0, 2, sampling=sampling)
        second = apart.prefill(segment, size=16)
        got = together.mixed([0, 2], [segment], Size(3, 16), sampling)
        assert tokens_of(got) == tokens_of([*first, *second])
        assert [one is None for one in got] == [False, True, end < 16]
        for one, other in zip(got, [*first, *second]):
            if one is not None and other is not None and one.logprob is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    (kv, state), (other_kv, other_state) = apart.snapshot(), together.snapshot()
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kv, other_kv)
    assert tokens_of(together.decode(0, 1, 2, sampling=sampling)) == tokens_of(
        apart.decode(0, 1, 2, sampling=sampling)
    )


def test_what_was_seen_is_prompt_once_and_output_counted(device: Device) -> None:
    output = tokens_of(device.prefill(device.segment(0, PROMPT, 0, last=True, prompt=len(PROMPT))))
    for _ in range(5):
        output += tokens_of(device.decode(0, size=1))
    np.testing.assert_array_equal(device.state.seen[0], reference.seen(VOCAB, PROMPT, output))
    assert not np.asarray(device.state.seen[1:]).any()


@pytest.mark.parametrize("cut", [3, 12, 16])
def test_resumed_output_is_seen_as_output_whichever_chunk_it_comes_in(device: Device, cut: int) -> None:
    """Tokens after the prompt are replayed output: counted, even if the prompt holds them, too."""
    prompt, resumed = PROMPT[:12], [3, 3, 17, 5, 17, 3]
    text = prompt + resumed
    device.prefill(device.segment(2, text[:cut], 0, last=False, prompt=12), size=16)
    output = tokens_of(device.prefill(device.segment(2, text[cut:], cut, last=True, prompt=12), size=16))
    np.testing.assert_array_equal(device.state.seen[2], reference.seen(VOCAB, prompt, resumed + output))


def test_a_new_user_of_a_lane_sees_nothing_of_the_last(device: Device) -> None:
    device.prefill(device.segment(0, PROMPT, 0, last=True, prompt=len(PROMPT), sampling=PENALISED))
    (one,) = device.prefill(
        device.segment(0, [4, 4], 0, last=True, prompt=2, sampling=replace(GREEDY, stop_ids=(9,)))
    )
    assert one is not None
    np.testing.assert_array_equal(device.state.seen[0], reference.seen(VOCAB, [4, 4], [one.id]))
    assert int(device.state.sampling.stop[0, 0]) == 9
    assert float(device.state.sampling.temperature[0]) == 0.0


def test_penalties_in_the_engine_equal_the_reference(device: Device, logits_after) -> None:
    """Every log-probability of every token, from the first after the prompt, through decoding, to a resumed output."""
    prompt = PROMPT[:9]
    (one,) = device.prefill(device.segment(0, prompt, 0, last=True, prompt=9, sampling=PENALISED))
    made = [one]
    for _ in range(5):
        made += device.decode(0, size=2, sampling=PENALISED)
    again = device.segment(1, [*prompt, *tokens_of(made[:4])], 0, last=True, prompt=9, sampling=PENALISED)
    (resumed,) = device.prefill(again, device.segment(2, PROMPT, 0, last=True, prompt=18))[:1]
    assert resumed is not None
    assert made[4] is not None
    assert resumed.id == made[4].id
    for number, one in [*enumerate(made), (4, resumed)]:
        assert one is not None
        output = tokens_of(made[:number])
        logits = logits_after([*prompt, *output])
        expected = reference.log_softmax(reference.processed(logits.tolist(), PENALISED, prompt, output))
        assert one.logprob == pytest.approx(expected[one.id], abs=2e-4)
        assert len(one.top) == VOCAB
        for token, logprob in one.top:
            assert logprob == pytest.approx(expected[token], abs=2e-4)


def test_a_lane_ends_on_the_device_with_its_budget_or_a_stop_token(device: Device) -> None:
    short = replace(GREEDY, max_tokens=3)
    made = device.prefill(device.segment(0, PROMPT, 0, last=True, prompt=18, sampling=short))
    for _ in range(4):
        made += device.decode(0, size=1)
    assert [one is not None for one in made] == [True, True, True, False, False]
    stopping = replace(GREEDY, stop_ids=(1, tokens_of(made)[1]))
    again = device.prefill(device.segment(1, PROMPT, 0, last=True, prompt=18, sampling=stopping))
    again += device.decode(1) + device.decode(1)
    kept = tokens_of(made)[: 1 + (tokens_of(made)[0] not in stopping.stop_ids)]
    assert tokens_of(again) == kept


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_forced_tokens_count_as_if_they_had_been_sampled(
    programs: Programs, params: tuple[jax.Array, ...], cut: int
) -> None:
    """One lane samples every token, a mask leaving one; the other samples two, and is given the rest as prompt in chunks."""
    prompt, forced = PROMPT[:9], [7, 7, 3, 18]

    def only(token: int) -> dict[int, np.ndarray]:
        return {0: np.array([1 << token], np.int32)}

    def begun() -> Device:
        device = Device(programs, params)
        start = device.segment(0, prompt, 0, last=True, prompt=9, sampling=PENALISED)
        (one,) = device.prefill(start, masks=only(5))
        (two,) = device.decode(0, size=1, sampling=PENALISED, masks=only(11))
        assert tokens_of([one, two]) == [5, 11]
        return device

    stepwise, jumping = begun(), begun()
    for token in forced:
        assert tokens_of(stepwise.decode(0, size=1, sampling=PENALISED, masks=only(token))) == [token]
    expected = stepwise.decode(0, size=1, sampling=PENALISED)
    pieces, at, got = [11, *forced], 10, []
    for part in (pieces[:cut], pieces[cut:]):
        if part:
            last = at + len(part) == 15
            segment = jumping.segment(0, part, at, last=last, prompt=9, sampling=PENALISED)
            got = jumping.prefill(segment._replace(recorded=11), size=16)
            at += len(part)
    assert tokens_of(got) == tokens_of(expected)
    np.testing.assert_array_equal(jumping.state.seen[0], stepwise.state.seen[0])
    np.testing.assert_array_equal(
        jumping.state.seen[0], reference.seen(VOCAB, prompt, [5, 11, *forced, *tokens_of(got)])
    )
