"""The scheduler's plans: by hand, and against a simulated device under random arrivals, cancels and shortage."""

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.fake_device import FakeDevice, FakeGuide, FakeLaunch, expected_ids
from xlane.engine import FinishReason, Request, SamplingParams, StepOutput, TokenOutput
from xlane.engine.pages import PageAllocator, pages_for
from xlane.engine.scheduler import Limits, Scheduler
from xlane.engine.sequence import Phase, Sequence
from xlane.engine.turn import NO_PAGE, Turn

PAGE = 4
MOST = 24
"""Tokens of the longest request."""


class NoSink:
    def deliver(self, batch: list[Any]) -> None:
        raise AssertionError("the scheduler delivers nothing")


def sequence(
    arrival: int,
    prompt: int | list[int],
    max_tokens: int = 8,
    priority: int = 0,
    resume=(),
    guided: int | None = None,
    late: list[FakeGuide] | None = None,
    **sampling,
) -> Sequence:
    """A prompt given by its length begins like no other arrival's. `guided`: with a grammar of so many tokens, whose
    masks go to `late` to be computed when the test likes."""
    ids = tuple(prompt if isinstance(prompt, list) else [arrival + 1, *range(2, prompt + 1)])
    asked = Request(
        id=f"r{arrival}",
        prompt_ids=ids,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling),
        priority=priority,
        resume_ids=tuple(resume),
        grammar=None if guided is None else str(guided),
    )
    made = Sequence(asked, NoSink(), arrival, min(MOST, len(ids) + max_tokens))
    if guided is not None:
        guide = FakeGuide(guided, late)
        guide.follow(resume)
        guide.mask = Future()
        guide.compute()
        made.follow(guide)  # type: ignore[arg-type]
    return made


def scheduler(pages: int = 32, lanes: int = 2, chunk_tokens: int = 8, chunk_segments: int = 4) -> Scheduler:
    return Scheduler(Limits(lanes, PAGE, chunk_tokens, chunk_segments), PageAllocator(pages))


def read(plans: Scheduler, turn: Turn, token: int = 50) -> list[StepOutput | None]:
    """Read back a turn, every lane having made the same token."""
    ended = [s for segment, s in zip(turn.segments, turn.prefilled) if segment.last]
    return [plans.absorb(s, TokenOutput(token)) for s in (*ended, *turn.decoded)]


def segments(turn: Turn) -> list[tuple[str, int, int, bool]]:
    """(request, first position, tokens, last) of each segment."""
    return [
        (s.request.id, seg.start, len(seg.tokens), seg.last) for s, seg in zip(turn.prefilled, turn.segments)
    ]


def decoded(turn: Turn) -> list[str]:
    return [s.request.id for s in turn.decoded]


def test_prompts_are_packed_in_order_of_arrival_and_the_last_one_is_cut() -> None:
    plans = scheduler(lanes=4)
    for one in (sequence(0, 3), sequence(1, 2), sequence(2, 7), sequence(3, 2)):
        plans.add(one)
    first = plans.plan()
    assert segments(first) == [("r0", 0, 3, True), ("r1", 0, 2, True), ("r2", 0, 3, False)]
    assert decoded(first) == ["r0", "r1"]
    second = plans.plan()
    assert segments(second) == [("r2", 3, 4, True), ("r3", 0, 2, True)]
    assert second.segments[0].tokens == [4, 5, 6, 7]
    assert decoded(second) == ["r0", "r1", "r2", "r3"]
    assert segments(plans.plan()) == []


def test_a_long_prompt_takes_the_whole_chunk_turn_after_turn_while_others_decode() -> None:
    plans = scheduler()
    plans.add(sequence(0, 1))
    plans.add(sequence(1, 20, max_tokens=2))
    turns = [plans.plan() for _ in range(4)]
    assert [segments(turn) for turn in turns] == [
        [("r0", 0, 1, True), ("r1", 0, 7, False)],
        [("r1", 7, 8, False)],
        [("r1", 15, 5, True)],
        [],
    ]
    assert [decoded(turn) for turn in turns] == [["r0"], ["r0"], ["r0", "r1"], ["r0"]]


def test_no_more_segments_than_a_launch_holds() -> None:
    plans = scheduler(lanes=4, chunk_segments=2)
    for number in range(4):
        plans.add(sequence(number, 1))
    assert [len(plans.plan().segments) for _ in range(3)] == [2, 2, 0]


def test_lower_priority_numbers_go_first_then_arrival() -> None:
    plans = scheduler(lanes=4)
    for number, priority in enumerate((1, 0, 1, -1)):
        plans.add(sequence(number, 1, priority=priority))
    assert [name for name, *_ in segments(plans.plan())] == ["r3", "r1", "r0", "r2"]


def test_a_lane_is_given_again_when_its_sequence_ends() -> None:
    plans = scheduler(lanes=1)
    plans.add(sequence(0, 2, max_tokens=1))
    plans.add(sequence(1, 2, max_tokens=1))
    first = plans.plan()
    assert decoded(first) == []  # one token was asked for, and the prefill makes it
    assert segments(plans.plan()) == []
    (output,) = read(plans, first)
    assert output is not None
    assert output.finish_reason is FinishReason.LENGTH
    again = plans.plan()
    assert segments(again) == [("r1", 0, 2, True)]
    assert again.segments[0].lane == 0


def test_the_budget_is_never_overlaunched() -> None:
    """With a turn in flight, the host must stop planning one token before it reads the last."""
    plans = scheduler()
    plans.add(sequence(0, 2, max_tokens=3))
    launched, turns = 0, []
    for _ in range(6):
        turns.append(plans.plan())
        launched += sum(seg.last for seg in turns[-1].segments) + len(turns[-1].rows)
        if len(turns) > 1:
            read(plans, turns[-2])
    assert launched == 3
    assert (plans.running, plans.waiting, plans.pages.free) == (0, 0, 32)


def test_a_page_is_sent_with_the_row_that_needs_it_and_only_then() -> None:
    plans = scheduler()
    one = sequence(0, 3, max_tokens=10)
    plans.add(one)
    rows = []
    for _ in range(10):
        turn = plans.plan()
        rows += turn.rows
        read(plans, turn)
    # Positions 3 … 11 are written by decoding; 4 and 8 open a page.
    assert [(index, page != NO_PAGE) for _, index, page in rows] == [
        (p // 4, p % 4 == 0) for p in range(3, 12)
    ]


def test_a_prompt_that_fills_its_pages_gets_the_next_one_in_the_same_turn() -> None:
    plans = scheduler()
    one = sequence(0, 8)
    plans.add(one)
    turn = plans.plan()
    assert turn.rows == [(0, 2, one.pages[2])]
    assert turn.segments[0].pages == one.pages


def test_admission_leaves_each_running_sequence_a_page_to_grow() -> None:
    plans = scheduler(pages=6, lanes=3)
    plans.add(sequence(0, 4, max_tokens=12))
    plans.plan()  # one page for the prompt, one for the first token
    plans.add(sequence(1, 9, max_tokens=4))  # 3 pages and 2 to spare: one too many
    assert segments(plans.plan()) == []
    assert plans.waiting == 1
    plans.drop(plans.sequences()[1])
    plans.add(sequence(2, 8, max_tokens=4))
    assert [name for name, *_ in segments(plans.plan())] == ["r2"]


def test_nobody_overtakes_the_first_of_the_queue() -> None:
    plans = scheduler(pages=6, lanes=3)
    plans.add(sequence(0, 4, max_tokens=12))
    plans.plan()
    plans.add(sequence(1, 20, max_tokens=4))
    plans.add(sequence(2, 1, max_tokens=1))
    assert segments(plans.plan()) == []


def test_the_youngest_gives_way_and_is_computed_again_with_its_output() -> None:
    plans = scheduler(pages=6, lanes=2)
    old, young = sequence(0, 4, max_tokens=16), sequence(1, 4, max_tokens=16)
    plans.add(old)
    plans.add(young)
    turns: list[Turn] = []
    while not plans.preemptions:
        turns.append(plans.plan())
        if len(turns) > 1:
            read(plans, turns[-2])
    assert (young.phase, young.pages, young.lane) == (Phase.WAITING, [], -1)
    assert old.phase is Phase.DECODE
    assert young.in_flight == 0  # the loop reads the turn before: what was on its way is kept
    known = len(young.tokens)
    assert known == 13
    plans.drop(old)
    again = plans.plan()
    # Of its three full pages the last went to the older one; the others are still there.
    assert segments(again) == [("r1", 8, 5, True)]
    assert again.segments[0].prompt_tokens == 4
    assert again.segments[0].remaining == young.most_tokens - known


def test_a_preempted_sequence_waits_for_its_tokens_in_flight() -> None:
    plans = scheduler()
    one = sequence(0, 4)
    plans.add(one)
    plans.plan()
    plans._preempt(one)
    assert one.in_flight == 2
    assert segments(plans.plan()) == []
    for token in (50, 51):
        plans.absorb(one, TokenOutput(token))
    turn = plans.plan()
    assert segments(turn) == [("r0", 4, 2, True)]
    assert [segment.tokens for segment in turn.segments] == [[50, 51]]


def test_a_sequence_preempted_while_its_last_token_is_in_flight_ends_without_a_lane() -> None:
    plans = scheduler()
    one = sequence(0, 4, stop_ids=(9,))
    plans.add(one)
    plans.plan()
    plans._preempt(one)
    assert one.in_flight == 2
    output = plans.absorb(one, TokenOutput(9))
    assert output is not None
    assert output.finish_reason is FinishReason.STOP
    assert plans.absorb(one, None) is None
    assert (plans.waiting, plans.running, plans.pages.free) == (0, 0, 32)


def test_an_end_that_is_read_while_the_next_launch_is_in_flight() -> None:
    plans = scheduler()
    one = sequence(0, 3, stop_ids=(9,))
    plans.add(one)
    first = plans.plan()
    second = plans.plan()
    outputs = read(plans, first, token=9)
    assert [o and o.finish_reason for o in outputs] == [FinishReason.STOP, None]
    assert [plans.absorb(s, None) for s in second.decoded] == [None]
    assert one.tokens == [1, 2, 3, 9]
    assert (plans.running, plans.pages.free) == (0, 32)
    assert decoded(plans.plan()) == []


def test_a_lane_that_ends_on_the_device_alone_is_an_error_and_no_hang() -> None:
    plans = scheduler()
    one = sequence(0, 3)
    plans.add(one)
    plans.plan()
    with pytest.raises(RuntimeError, match="r0 ended on the device but not on the host"):
        plans.absorb(one, None)


def test_who_begins_alike_computes_only_the_rest() -> None:
    plans = scheduler(lanes=4, chunk_tokens=32)
    begin = list(range(10, 20))
    one = sequence(0, [*begin, 1, 2], max_tokens=3)
    plans.add(one)
    first = plans.plan()
    assert segments(first) == [("r0", 0, 12, True)]
    two, three = sequence(1, [*begin, 3]), sequence(2, [*begin, 1, 2])
    plans.add(two)
    plans.add(three)
    second = plans.plan()
    # Two full pages of four are shared; the third differs. Of a prompt that is known whole, the last page is computed.
    assert segments(second) == [("r1", 8, 3, True), ("r2", 8, 4, True)]
    assert two.pages[:2] == three.pages[:2] == one.pages[:2]
    assert len({two.pages[2], three.pages[2], one.pages[2]}) == 3
    outputs = [*read(plans, first), *read(plans, second)]
    firsts = {o.request_id: o.cached_tokens for o in reversed(outputs) if o is not None}
    assert firsts == {"r0": 0, "r1": 8, "r2": 8}


def test_what_was_generated_is_found_too() -> None:
    plans = scheduler(chunk_tokens=32)
    one = sequence(0, 4, max_tokens=6)
    plans.add(one)
    while plans.sequences():
        read(plans, plans.plan())
    assert len(one.tokens) == 10
    plans.add(sequence(1, [*one.tokens, 7]))
    assert segments(plans.plan()) == [("r1", 8, 3, True)], "as the next turn of a conversation"


def test_one_launch_serves_many_that_begin_alike_and_come_at_once() -> None:
    plans = scheduler(lanes=4, chunk_tokens=16)
    for number in range(3):
        plans.add(sequence(number, [*range(10, 18), number]))
    assert segments(plans.plan()) == [("r0", 0, 9, True), ("r1", 8, 1, True), ("r2", 8, 1, True)]


@pytest.mark.parametrize(
    "changes", [{"cache_salt": "other"}, {"prompt_logprobs": 0}, {"sampling": {"repetition_penalty": 1.1}}]
)
def test_who_must_not_share_computes_everything(changes: dict[str, Any]) -> None:
    plans = scheduler(lanes=2, chunk_tokens=32)
    plans.add(sequence(0, list(range(12))))
    plans.plan()
    sampling = changes.pop("sampling", {})
    one = sequence(1, list(range(12)), **sampling)
    one.request = replace(one.request, **changes)
    plans.add(one)
    assert segments(plans.plan()) == [("r1", 0, 12, True)]


def test_shared_pages_are_taken_for_new_ones_only_when_nobody_holds_them() -> None:
    plans = scheduler(pages=4, lanes=2, chunk_tokens=32)
    one = sequence(0, 8, max_tokens=1)
    plans.add(one)
    read(plans, plans.plan())
    assert (plans.pages.free, plans.pages.remembered) == (4, 2)
    plans.add(sequence(1, [40] * 13, max_tokens=1))  # needs all four
    read(plans, plans.plan())
    assert plans.pages.evictions == 2
    plans.add(sequence(2, 8, max_tokens=1))
    assert segments(plans.plan()) == [("r2", 0, 8, True)]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_cancel_frees_everything_in_each_phase(turns: int) -> None:
    """Waiting, in the middle of its prompt, decoding."""
    plans = scheduler(lanes=1)
    one, other = sequence(0, 14), sequence(1, 2)
    plans.add(one)
    plans.add(other)
    made = [plans.plan() for _ in range(turns)]
    phases = [Phase.WAITING, Phase.PREFILL, Phase.DECODE, Phase.DECODE]
    assert one.phase is phases[turns]
    plans.drop(one)
    plans.drop(one)  # twice is once
    assert plans.pages.free == 32
    assert plans.sequences() == [other]
    for turn in made:
        assert read(plans, turn) == [None] * (sum(seg.last for seg in turn.segments) + len(turn.rows))
    assert [name for name, *_ in segments(plans.plan())] == ["r1"]


def test_resumed_output_is_no_prompt_and_counts_against_the_budget() -> None:
    plans = scheduler()
    plans.add(sequence(0, 3, max_tokens=5, resume=(7, 8)))
    (segment,) = plans.plan().segments
    assert (segment.tokens, segment.prompt_tokens, segment.remaining) == ([1, 2, 3, 7, 8], 3, 3)


def test_a_guided_sequence_does_not_run_ahead_and_free_ones_do() -> None:
    """One turn is always in flight, as in the loop: the guided one is in every second."""
    plans = scheduler(lanes=3)
    plans.add(sequence(0, 3, max_tokens=9))
    guided = sequence(1, 3, max_tokens=9, guided=20)
    plans.add(guided)
    turns = [plans.plan(), plans.plan()]
    assert isinstance(guided.guide, FakeGuide)
    for made in (1, 1):
        for one in (*turns[-2].prefilled, *turns[-2].decoded):
            plans.absorb(one, TokenOutput(guided.guide.allowed()[0] if one is guided else 50))
        assert len(guided.tokens) == 3 + made
        turns.append(plans.plan())
    assert [decoded(turn) for turn in turns] == [["r0"], ["r0"], ["r0", "r1"], ["r0"]]


def test_a_sequence_whose_mask_is_late_waits_alone() -> None:
    late: list[FakeGuide] = []
    plans = scheduler(lanes=3)
    one = sequence(0, 3, guided=20, late=late)
    plans.add(one)
    plans.add(sequence(1, 3))
    first = plans.plan()
    assert decoded(first) == ["r1"]
    assert isinstance(one.guide, FakeGuide)
    plans.absorb(one, TokenOutput(one.guide.allowed()[0]))
    assert [decoded(plans.plan()) for _ in range(2)] == [["r1"], ["r1"]]
    late.pop().compute()
    assert decoded(plans.plan()) == ["r0", "r1"]


def test_forced_tokens_are_one_piece_of_prompt_that_counts_none_twice() -> None:
    plans = scheduler()
    one = sequence(0, 3, max_tokens=20, guided=20)
    plans.add(one)
    plans.plan()
    assert isinstance(one.guide, FakeGuide)
    first = plans.absorb(one, TokenOutput(one.guide.allowed()[0]))
    assert decoded(plans.plan()) == ["r0"]
    second = plans.absorb(one, TokenOutput(one.guide.allowed()[0]))
    assert first is not None
    assert second is not None
    assert [len(first.tokens), len(second.tokens)] == [1, 4]
    turn = plans.plan()
    (segment,) = turn.segments
    assert turn.rows == []
    assert segment.tokens == one.tokens[4:8] == [token.id for token in second.tokens]
    assert (segment.start, segment.recorded, segment.last) == (4, 5, True)
    assert (segment.prompt_tokens, segment.remaining) == (3, 23 - 8)
    assert len(segment.pages) == 3  # eight tokens, and the next one


class Machine(RuleBasedStateMachine):
    """Random requests over a simulated device, one turn ahead as `loop.Loop` runs it.

    The device computes tokens from what it reads through its page tables, so equal outputs mean that no page, lane or
    write went wrong; the invariants name what did.
    """

    @initialize(
        pages=st.integers(pages_for(MOST, PAGE), 12),
        lanes=st.integers(1, 6),
        chunk=st.sampled_from([3, 8, 16]),
        packed=st.integers(1, 4),
    )
    def start(self, pages: int, lanes: int, chunk: int, packed: int) -> None:
        self.plans = scheduler(pages, lanes, chunk, packed)
        self.device = FakeDevice(lanes, pages, PAGE, pages_for(MOST, PAGE))
        self.behind: list[FakeLaunch] = []
        self.all: list[Sequence] = []
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.cancelled: set[str] = set()
        self.late: list[FakeGuide] = []
        """Guides whose masks were not computed yet."""

    @rule(
        prompt=st.lists(st.integers(0, 63), min_size=1, max_size=MOST - 1),
        max_tokens=st.integers(1, MOST),
        stop=st.none() | st.integers(0, 63),
        priority=st.sampled_from([0, 0, 0, 1]),
        seed=st.integers(0, 3),
        given=st.integers(0, 6),
        guided=st.none() | st.integers(0, MOST),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        stop: int | None,
        priority: int,
        seed: int,
        given: int,
        guided: int | None = None,
    ) -> None:
        options = {"stop_ids": (stop,) if stop is not None else (), "seed": seed, "priority": priority}
        options |= {"guided": guided, "late": self.late, "repetition_penalty": 1.5 if seed == 3 else 1.0}
        if guided is not None:
            options["stop_ids"] = ()  # FakeGuide knows no end but its own
        one = sequence(len(self.all), prompt, max_tokens, **options)
        resume = expected_ids(one.request, MOST)[:-1][:given]  # as after the loss of an engine
        one = sequence(len(self.all), prompt, max_tokens, resume=resume, **options)
        self.all.append(one)
        self.outputs[one.request.id] = list(resume)
        self.plans.add(one)

    @rule(count=st.integers(2, 6), prompt=st.integers(1, 5), seed=st.integers(0, 3), guided=st.booleans())
    def burst(self, count: int, prompt: int, seed: int, guided: bool) -> None:
        """Short prompts with long outputs: all are admitted, and then there are not enough pages."""
        for number in range(count):
            self.submit(
                [seed, number, *range(prompt - 1)],
                MOST,
                None,
                0,
                seed,
                0,
                MOST if guided and number % 2 else None,
            )

    @precondition(lambda self: self.all)
    @rule(
        which=st.integers(0, 10**6),
        kept=st.integers(1, MOST - 2),
        new=st.lists(st.integers(0, 63), max_size=3),
    )
    def follow_up(self, which: int, kept: int, new: list[int]) -> None:
        """A prompt that begins as another sequence does or did."""
        one = self.all[which % len(self.all)]
        self.submit([*one.tokens[:kept], *new][: MOST - 1], MOST, None, 0, one.request.sampling.seed, 0)

    @precondition(lambda self: self.all)
    @rule(which=st.integers(0, 10**6))
    def cancel(self, which: int) -> None:
        one = self.all[which % len(self.all)]
        if one.phase is not Phase.FINISHED:
            self.cancelled.add(one.request.id)
        self.plans.drop(one)

    @rule(count=st.integers(1, 6), masks=st.integers(0, 3))
    def turn(self, count: int, masks: int = 8) -> None:
        for _ in range(count):
            for guide in self.late[:masks]:
                guide.compute()
            del self.late[:masks]
            plan = self.plans.plan()
            limits = self.plans.limits
            assert sum(len(segment.tokens) for segment in plan.segments) <= limits.chunk_tokens
            assert len(plan.segments) <= limits.chunk_segments
            assert all(one.length <= one.most_tokens for one in plan.decoded)
            ahead = self.device.launch(plan)
            self.tables_agree()
            for launch in self.behind:
                for one, token in launch.read():
                    self.take(self.plans.absorb(one, token))
            self.behind = ahead

    def take(self, output: StepOutput | None) -> None:
        if output is None:
            return
        name = output.request_id
        assert name not in self.cancelled
        assert name not in self.reasons
        self.outputs[name] += [token.id for token in output.tokens]
        if output.finish_reason is not None:
            self.reasons[name] = output.finish_reason

    def tables_agree(self) -> None:
        """What the device would read for a lane is what the host thinks the lane holds."""
        for one in self.plans.sequences():
            if one.lane >= 0 and one.computed:
                used = pages_for(one.computed, PAGE)
                assert self.device.lanes[one.lane].table[:used] == one.pages[:used]

    @invariant()
    def nothing_is_shared_or_lost(self) -> None:
        if not hasattr(self, "plans"):
            return
        unfinished = [one for one in self.all if one.phase is not Phase.FINISHED]
        running = [one for one in unfinished if one.phase is not Phase.WAITING]
        assert sorted(map(id, unfinished)) == sorted(map(id, self.plans.sequences()))
        held = {page for one in self.all for page in one.pages}
        assert len(held) == self.plans.pages.total - self.plans.pages.free
        assert all(len(one.pages) == len(set(one.pages)) for one in self.all)
        lanes = [one.lane for one in running]
        assert len(lanes) == len(set(lanes)) <= self.plans.limits.lanes
        assert all(one.lane == -1 and not one.pages for one in self.all if one not in running)
        assert all(0 <= one.in_flight <= 3 for one in unfinished)

    def teardown(self) -> None:
        """Nobody starves, and every output is that of an undisturbed run."""
        if not hasattr(self, "plans"):
            return
        for _ in range(40 * (len(self.all) + 1)):
            if not self.plans.sequences():
                break
            self.turn(1)
            self.nothing_is_shared_or_lost()
        assert not self.plans.sequences()
        self.turn(1)
        assert self.plans.pages.free == self.plans.pages.total
        for one in self.all:
            name, expected = one.request.id, expected_ids(one.request, MOST)
            if name in self.cancelled:
                assert self.outputs[name] == expected[: len(self.outputs[name])]
            else:
                assert self.outputs[name] == expected
                stops = one.request.sampling.stop_ids if one.guide is None else one.guide.end_ids
                stopped = expected[-1] in stops
                assert self.reasons[name] is (FinishReason.STOP if stopped else FinishReason.LENGTH)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
