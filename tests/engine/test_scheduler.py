"""The scheduler's plans, by hand."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from tests.support.fake_device import FakeGuide, Oracle, expected_ids
from xlane.engine import FinishReason, Request, SamplingParams, StepOutput, TokenOutput
from xlane.engine.pages import PageAllocator
from xlane.engine.scheduler import Limits, Scheduler
from xlane.engine.sequence import Phase, Sequence
from xlane.engine.turn import NO_PAGE, SEGMENT_TOKENS, Row, Turn

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
    owner: str = "",
    weight: int = 1,
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
        owner=owner,
        weight=weight,
    )
    made = Sequence(asked, NoSink(), arrival, min(MOST, len(ids) + max_tokens))
    if guided is not None:
        guide = FakeGuide(guided, late)
        guide.follow(resume)
        guide.mask = Future()
        guide.compute()
        made.follow(guide)  # type: ignore[arg-type]
    return made


def scheduler(
    pages: int = 32,
    lanes: int = 2,
    chunk_tokens: int = 8,
    chunk_segments: int = 4,
    budget: Callable[[int, int], int] | None = None,
    decode_rows: int = 0,
    segment_tokens: int = 1,
) -> Scheduler:
    limits = Limits(lanes, PAGE, chunk_tokens, chunk_segments, decode_rows, segment_tokens)
    return Scheduler(limits, PageAllocator(pages), budget)


def read(plans: Scheduler, turn: Turn, token: int = 50) -> list[StepOutput | None]:
    """Read back a turn, every lane having made the same token."""
    ended = [s for segment, s in zip(turn.segments, turn.prefilled) if segment.last]
    return [plans.absorb(s, (TokenOutput(token),)) for s in (*ended, *turn.decoded)]


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
    assert decoded(first) == []
    second = plans.plan()
    assert segments(second) == [("r2", 3, 4, True), ("r3", 0, 2, True)]
    assert second.segments[0].tokens == [4, 5, 6, 7]
    assert decoded(second) == ["r0", "r1"]
    third = plans.plan()
    assert segments(third) == []
    assert decoded(third) == ["r0", "r1", "r2", "r3"]


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
    assert [decoded(turn) for turn in turns] == [[], ["r0"], ["r0"], ["r0", "r1"]]


def test_it_tells_what_each_lane_does() -> None:
    plans = scheduler(lanes=3, pages=64)
    for one in (sequence(0, 3, max_tokens=4), sequence(1, 20, max_tokens=2), sequence(2, 1)):
        plans.add(one)
    read(plans, plans.plan())

    def told() -> list[tuple[int | bool, ...]]:
        return [
            (
                s.lane,
                s.prefill,
                s.prompt_tokens,
                s.generated_tokens,
                s.computed_tokens,
                s.most_tokens,
                s.pages,
            )
            for s in plans.taken_lanes()
        ]

    assert told() == [(0, False, 3, 1, 3, 7, 1), (1, True, 20, 0, 5, 22, 5)]
    read(plans, plans.plan())
    assert told() == [(0, False, 3, 2, 4, 7, 1), (1, True, 20, 0, 13, 22, 5)]
    plans.drop(plans.sequences()[0])
    assert [lane.lane for lane in plans.taken_lanes()] == [1]
    assert all(0 <= lane.age_s < 60 for lane in plans.taken_lanes())


def test_the_budget_is_asked_with_the_lanes_that_decode_and_the_prompts_that_could_be_computed() -> None:
    asked: list[tuple[int, int, int]] = []

    def budget(*told: int) -> int:
        asked.append(told)
        rows, *_ = told
        return 8 if rows == 0 else 2 + rows

    plans = scheduler(lanes=4, budget=budget)
    for number, prompt in enumerate((2, 3, 20)):
        plans.add(sequence(number, prompt))
    turns = [plans.plan() for _ in range(3)]
    # The first two prompts go into a launch of 8 tokens whole, so there is one more; of the third 3, 7, 11 and 15 are computed.
    assert asked == [(0, 4, 0), (2, 1, 3), (2, 1, 7)]
    assert [sum(tokens for _, _, tokens, _ in segments(turn)) for turn in turns] == [8, 4, 4]
    plans.plan()
    plans.plan()
    assert asked[3:] == [(2, 1, 11), (2, 1, 15)]


def test_a_prompt_counts_twice_if_a_launch_could_compute_all_of_it() -> None:
    for prompt, prompts in ((8, 2), (9, 1)):
        asked: list[tuple[int, ...]] = []
        plans = scheduler(budget=lambda *told, asked=asked: asked.append(told) or 4)
        plans.add(sequence(0, prompt))
        plans.plan()
        plans.plan()  # also in pieces; the end of a longer one does not
        assert asked == [(0, prompts, 0), (0, prompts, 4)]


def test_no_more_segments_than_a_launch_holds() -> None:
    plans = scheduler(lanes=4, chunk_segments=2)
    for number in range(4):
        plans.add(sequence(number, 1))
    assert [len(plans.plan().segments) for _ in range(3)] == [2, 2, 0]


def test_few_tokens_are_shared_by_few() -> None:
    """Of 8 tokens two may share; and what they share is asked for, though it is less."""
    plans = scheduler(lanes=4, segment_tokens=SEGMENT_TOKENS)
    for number in range(3):
        plans.add(sequence(number, 1))
    turns = [plans.plan() for _ in range(3)]
    assert [len(turn.segments) for turn in turns] == [2, 1, 0]
    assert [turn.asks for turn in turns] == [(0, 2 * SEGMENT_TOKENS), (2, 1), (3, 0)]


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
    assert [(index, page != NO_PAGE) for _, index, page, *_ in rows] == [
        (p // 4, p % 4 == 0) for p in range(3, 12)
    ]


def test_a_prompt_that_fills_its_pages_gets_the_next_one_when_it_decodes() -> None:
    plans = scheduler()
    one = sequence(0, 8)
    plans.add(one)
    assert len(plans.plan().segments[0].pages) == 2
    assert plans.plan().rows == [Row(0, 2, one.pages[2])]


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
    plans.plan()
    plans._preempt(one)
    assert one.in_flight == 2
    assert segments(plans.plan()) == []
    for token in (50, 51):
        plans.absorb(one, (TokenOutput(token),))
    turn = plans.plan()
    assert segments(turn) == [("r0", 4, 2, True)]
    assert [segment.tokens for segment in turn.segments] == [[50, 51]]


def test_a_sequence_preempted_while_its_last_token_is_in_flight_ends_without_a_lane() -> None:
    plans = scheduler()
    one = sequence(0, 4, stop_ids=(9,))
    plans.add(one)
    plans.plan()
    plans.plan()
    plans._preempt(one)
    assert one.in_flight == 2
    output = plans.absorb(one, (TokenOutput(9),))
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
    assert [o and o.finish_reason for o in outputs] == [FinishReason.STOP]
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
    assert [len(turn.segments) for turn in turns] == [2, 0]
    assert isinstance(guided.guide, FakeGuide)
    for made in (1, 1):
        for one in (*turns[-2].prefilled, *turns[-2].decoded):
            plans.absorb(one, (TokenOutput(guided.guide.allowed()[0] if one is guided else 50),))
        assert len(guided.tokens) == 3 + made
        turns.append(plans.plan())
    assert [decoded(turn) for turn in turns] == [[], ["r0"], ["r0", "r1"], ["r0"]]


def test_a_sequence_whose_mask_is_late_waits_alone() -> None:
    late: list[FakeGuide] = []
    plans = scheduler(lanes=3)
    one = sequence(0, 3, guided=20, late=late)
    plans.add(one)
    plans.add(sequence(1, 3))
    assert decoded(plans.plan()) == []
    assert decoded(plans.plan()) == ["r1"]
    assert isinstance(one.guide, FakeGuide)
    plans.absorb(one, (TokenOutput(one.guide.allowed()[0]),))
    assert [decoded(plans.plan()) for _ in range(2)] == [["r1"], ["r1"]]
    late.pop().compute()
    assert decoded(plans.plan()) == ["r0", "r1"]


def test_forced_tokens_are_one_piece_of_prompt_that_counts_none_twice() -> None:
    plans = scheduler()
    one = sequence(0, 3, max_tokens=20, guided=20)
    plans.add(one)
    plans.plan()
    assert isinstance(one.guide, FakeGuide)
    first = plans.absorb(one, (TokenOutput(one.guide.allowed()[0]),))
    assert decoded(plans.plan()) == ["r0"]
    second = plans.absorb(one, (TokenOutput(one.guide.allowed()[0]),))
    assert first is not None
    assert second is not None
    assert [len(first.tokens), len(second.tokens)] == [1, 4]
    turn = plans.plan()
    (segment,) = turn.segments
    assert turn.rows == []
    assert segment.tokens == one.tokens[4:8] == [token.id for token in second.tokens]
    assert (segment.start, segment.recorded, segment.last) == (4, 5, True)
    assert (segment.prompt_tokens, segment.remaining) == (3, 23 - 8)
    assert len(segment.pages) == 2


def speculating(arrival: int, prompt: int, most: int = 4, wrong: int = 10**6, **options) -> Sequence:
    """A sequence whose next tokens are guessed, every `wrong`-th token wrongly."""
    made = sequence(arrival, prompt, **options)
    made.drafter = Oracle(made, most, MOST, lambda at: at % wrong == 0)  # type: ignore[assignment]
    return made


def settle(plans: Scheduler, turn: Turn) -> None:
    """Read back a turn in which nobody guessed, every sequence having said what it would."""
    ended = [s for segment, s in zip(turn.segments, turn.prefilled) if segment.last]
    for one in (*ended, *turn.decoded):
        said = len(one.tokens) - one.prompt_tokens
        plans.absorb(one, (TokenOutput(expected_ids(one.request, MOST)[said]),))


def test_guesses_have_the_rows_that_lanes_leave_free_and_the_oldest_has_them_first() -> None:
    plans = scheduler(lanes=3, decode_rows=8)
    for one in (speculating(0, 2), speculating(1, 2), sequence(2, 2)):
        plans.add(one)
    turn = plans.plan()  # their first tokens are in flight: nobody can guess
    assert plans.hopes
    settle(plans, turn)
    assert not plans.hopes
    turn = plans.plan()
    assert [(row.lane, row.ahead) for row in turn.rows] == [
        *[(0, ahead) for ahead in range(5)], (1, 0), (1, 1), (2, 0)
    ]  # fmt: skip
    assert [one.guessed for one in plans.sequences()] == [4, 1, 0]


def test_nobody_is_waited_for_where_lanes_leave_no_rows() -> None:
    plans = scheduler(lanes=2, decode_rows=2)
    for arrival in range(2):
        plans.add(speculating(arrival, 2))
    plans.plan()
    assert not plans.hopes


def test_guesses_take_no_page_that_a_running_sequence_may_need() -> None:
    plans = scheduler(pages=3, lanes=2, decode_rows=16)
    one = speculating(0, 3, most=8, max_tokens=9)
    plans.add(one)
    settle(plans, plans.plan())
    assert len(one.tokens) == 4
    turn = plans.plan()
    # Its second page is filled with guesses, as if another sequence needed the third.
    assert (len(one.pages), len(turn.rows), plans.pages.free) == (2, 5, 1)


def test_what_was_accepted_is_computed_and_what_was_not_is_computed_again() -> None:
    plans = scheduler(lanes=1, decode_rows=16)
    one = speculating(0, 3, most=4)
    plans.add(one)
    plans.plan()
    text = expected_ids(one.request, MOST)
    plans.absorb(one, (TokenOutput(text[0]),))
    turn = plans.plan()
    assert [row.guess for row in turn.rows[1:]] == text[1:5]
    assert decoded(plans.plan()) == []  # how many tokens are in flight is not known
    output = plans.absorb(one, tuple(TokenOutput(token) for token in text[1:4]))
    assert output is not None
    assert [token.id for token in output.tokens] == text[1:4]
    assert one.computed == 3 + 4 - 1
    assert plans.guessed == 4
    # Eight tokens are allowed: the last one is sampled after the guesses.
    assert [row.guess for row in plans.plan().rows[1:]] == text[4:7]
