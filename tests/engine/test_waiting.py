"""Fair shares: what owners are given while they wait, counted here from the plans alone."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_scheduler import MOST, PAGE, read, scheduler, segments, sequence
from xlane.engine.pages import pages_for
from xlane.engine.scheduler import Scheduler
from xlane.engine.sequence import Sequence

PROMPT, OUTPUT = 8, 12
"""Most tokens of the sequences here."""


def a_turn(plans: Scheduler, given: Counter[str]) -> None:
    """Plan and read one turn; count what it gave to each owner, a made token as two of a prompt."""
    turn = plans.plan()
    for one, segment in zip(turn.prefilled, turn.segments, strict=True):
        given[one.request.owner] += len(segment.tokens)
    owners = {one.request.id: one.request.owner for one in (*turn.prefilled, *turn.decoded)}
    for output in read(plans, turn):
        assert output is not None
        given[owners[output.request_id]] += 2 * len(output.tokens)


sizes = st.lists(st.tuples(st.integers(1, PROMPT), st.integers(1, OUTPUT)), min_size=4, max_size=8)


@given(few=sizes, many=sizes, lanes=st.integers(1, 4), weight=st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None)
def test_ten_times_the_requests_get_no_more_tokens(few, many, lanes: int, weight: int) -> None:
    """As long as both wait, what each was given by its weight differs by no more than twice what the lanes hold (the paper's
    bound); and all end."""
    plans = scheduler(pages=lanes * pages_for(MOST, PAGE) + 2 * lanes, lanes=lanes)
    waiting: list[Sequence] = [
        sequence(n, size, most, owner="many") for n, (size, most) in enumerate(many * 10)
    ]
    waiting += [
        sequence(1000 + n, size, most, owner="few", weight=weight) for n, (size, most) in enumerate(few * 2)
    ]
    for one in waiting:
        plans.add(one)
    given_: Counter[str] = Counter()
    bound = 2 * lanes * (PROMPT + 2 * OUTPUT)
    while {one.request.owner for one in plans.sequences() if one.lane < 0} == {"many", "few"}:
        a_turn(plans, given_)
        assert abs(given_["many"] - given_["few"] / weight) <= bound
    for _ in range(30 * len(waiting)):
        if plans.waiting or plans.running:
            a_turn(plans, given_)
    assert (plans.waiting, plans.running) == (0, 0)


def test_one_who_comes_late_is_next_and_rest_is_no_credit() -> None:
    plans, given_ = scheduler(lanes=1), Counter()
    plans.add(sequence(0, 2, 2, owner="few"))
    for number in range(1, 30):
        plans.add(sequence(number, 2, 2, owner="many"))
    while plans.waiting > 14:
        a_turn(plans, given_)
    for number in range(30, 34):
        plans.add(sequence(number, 2, 2, owner="few"))
    started: list[str] = []
    while len(started) < 8:
        turn = plans.plan()
        started += [name for name, *_ in segments(turn)]
        read(plans, turn)
    # Of the same sizes, so in turns at once: "many" was given much while "few" did not ask, which is forgiven.
    assert sum(int(name[1:]) >= 30 for name in started) == 4
    assert any(int(name[1:]) >= 30 for name in started[:2])


def test_priority_goes_before_shares_and_somebody_alone_gets_every_lane() -> None:
    plans, given_ = scheduler(lanes=3), Counter()
    plans.add(sequence(0, 2, 8, owner="few"))
    a_turn(plans, given_)
    for number in range(1, 4):
        plans.add(sequence(number, 2, 8, owner="few", priority=-1))
    plans.add(sequence(4, 2, 8, owner="other"))
    a_turn(plans, given_)
    assert {one.request.id for one in plans.sequences() if one.lane >= 0} == {"r1", "r2", "r3"}
