"""Who goes first, who gives way, and that nobody waits for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_scheduler import MOST, PAGE, decoded, read, scheduler, segments, sequence
from xlane.engine.pages import pages_for
from xlane.engine.sequence import Phase
from xlane.engine.turn import Turn


def test_an_urgent_prompt_goes_before_the_rest_of_a_long_one() -> None:
    plans = scheduler(lanes=3)
    plans.add(sequence(0, 20))
    assert segments(plans.plan()) == [("r0", 0, 8, False)]
    plans.add(sequence(1, 3, priority=-1))
    plans.add(sequence(2, 3))
    assert segments(plans.plan()) == [("r1", 0, 3, True), ("r0", 8, 5, False)]
    assert segments(plans.plan()) == [("r0", 13, 7, True), ("r2", 0, 1, False)]


def test_of_lesser_priority_the_youngest_gives_its_lane_and_goes_on_later() -> None:
    plans = scheduler(lanes=3)
    for number, priority in enumerate((1, 2, 2)):
        plans.add(sequence(number, 2, priority=priority))
    read(plans, plans.plan())
    before = plans.plan()
    assert decoded(before) == ["r0", "r1", "r2"]
    plans.add(sequence(3, 2, max_tokens=1, priority=1))
    urgent = plans.plan()
    assert segments(urgent) == [("r3", 0, 2, True)]
    assert decoded(urgent) == ["r0", "r1"]
    assert plans.preemptions == 1
    read(plans, before)
    read(plans, urgent)  # r3 ends
    # Its token that was under way is kept, and what it had computed is computed again.
    assert segments(plans.plan()) == [("r2", 0, 4, True)]


@pytest.mark.parametrize("prompt", [2, 3])
def test_who_gave_way_and_is_admitted_again_at_once_takes_one_part_in_a_turn(prompt: int) -> None:
    """It gives back a page that it had taken for guesses, too: without that there is room for both."""
    plans = scheduler(pages=4, chunk_tokens=16)
    one = sequence(0, prompt)
    plans.add(one)
    read(plans, plans.plan())
    one.pages += plans.pages.take(1) or []
    plans.add(sequence(1, 1, priority=-1))
    turn = plans.plan()
    assert plans.preemptions == 1
    assert segments(turn) == [("r1", 0, 1, True), ("r0", 0, prompt + 1, True)]
    assert decoded(turn) == []


def test_among_equals_nobody_gives_way_to_one_that_waits() -> None:
    plans = scheduler(lanes=1)
    plans.add(sequence(0, 2))
    plans.plan()
    plans.add(sequence(1, 2))
    assert segments(plans.plan()) == []
    assert (plans.preemptions, plans.waiting) == (0, 1)


def test_nobody_gives_way_in_vain() -> None:
    """Six pages: three held by one of equal priority, one by one that would give way, five wanted."""
    plans = scheduler(pages=6, lanes=3, chunk_tokens=16)
    plans.add(sequence(0, 9, max_tokens=2))
    plans.add(sequence(1, 2, max_tokens=2, priority=1))
    plans.plan()
    plans.add(sequence(2, 17))
    assert segments(plans.plan()) == []
    assert plans.preemptions == 0


def test_as_many_give_way_as_it_takes() -> None:
    """Two pages each, and six left: four are wanted and one to spare for each sequence that runs."""
    plans = scheduler(pages=12, lanes=4, chunk_tokens=32)
    for number in range(3):
        plans.add(sequence(number, 5, priority=1))
    plans.plan()
    assert plans.pages.free == 6
    plans.add(sequence(3, 14))
    assert [name for name, *_ in segments(plans.plan())] == ["r3"]
    phases = [one.phase for one in sorted(plans.sequences(), key=lambda one: one.arrival)]
    assert phases == [Phase.DECODE, Phase.DECODE, Phase.WAITING, Phase.DECODE]


@given(
    pages=st.integers(pages_for(MOST, PAGE), 12),
    lanes=st.integers(1, 4),
    sizes=st.lists(st.tuples(st.integers(1, MOST - 1), st.integers(1, MOST)), min_size=1, max_size=60),
    a_turn=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_equals_start_in_order_of_arrival_and_all_end(
    pages: int, lanes: int, sizes: list[tuple[int, int]], a_turn: int
) -> None:
    """However many come behind it, and however small: the first of the line is served in the time that those take who
    were there before it."""
    plans = scheduler(pages, lanes)
    coming = [sequence(number, *size) for number, size in enumerate(sizes)]
    everyone, started, behind = [*coming], [], Turn()
    for _ in range(2 * MOST * len(everyone) + 2):
        for one in coming[:a_turn]:
            plans.add(one)
        del coming[:a_turn]
        turn = plans.plan()
        started += [one for one in turn.prefilled if one not in started]
        read(plans, behind)
        behind = turn
    assert started == everyone
    assert all(one.phase is Phase.FINISHED for one in everyone)
    assert plans.pages.free == pages


@given(
    arrivals=st.lists(st.tuples(st.integers(-2, 2), st.integers(1, MOST - 1)), min_size=1, max_size=40),
    lanes=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_nobody_starts_while_a_more_urgent_one_waits(arrivals: list[tuple[int, int]], lanes: int) -> None:
    plans = scheduler(8, lanes)
    behind = Turn()
    for number, (priority, prompt) in enumerate(arrivals):
        plans.add(sequence(number, prompt, priority=priority))
        waited = {one for one in plans.sequences() if one.phase is Phase.WAITING}
        turn = plans.plan()
        waiting = [one for one in plans.sequences() if one.phase is Phase.WAITING and one in waited]
        for one in turn.prefilled:
            assert one not in waited or all(one.order < other.order for other in waiting)
        read(plans, behind)
        behind = turn
