"""Sequences that begin alike: which pages they share, what is computed still, who must not share."""

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.test_scheduler import read, scheduler, segments, sequence


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


@pytest.mark.parametrize("salt", ["", "abc 2.0", "abc 2.0\0", "\0abc 2.0\0", "\0"])
def test_no_salt_finds_the_pages_of_an_adapter(salt: str) -> None:
    plans = scheduler(lanes=4, chunk_tokens=64)
    for number, (digest, named) in enumerate((("abc 2.0", ""), ("", salt), ("abc 2.0", ""), ("", salt))):
        one = sequence(number, list(range(12)))
        one.adapter, one.adapter_digest = int(digest != ""), digest
        one.request = replace(one.request, cache_salt=named)
        plans.add(one)
    found = [start for _, start, *_ in segments(plans.plan())]
    assert found == [0, 0, 8, 8], "each only what was computed under the same adapter and salt"


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


BEGIN = list(range(10, 26))
"""Four pages."""


@pytest.mark.parametrize("enough", [False, True])
@pytest.mark.parametrize(
    ("stays", "comes", "gain"),
    [([30] * 17, [40] * 17, 6), ([*BEGIN, 30], [40] * 17, 2), ([30] * 17, [*BEGIN, 40], 2)],
    ids=["what they share", "what one that stays holds too", "what the newcomer shares"],
)
def test_nobody_gives_way_in_vain_for_shared_pages(
    stays: list[int], comes: list[int], gain: int, enough: bool
) -> None:
    """Two lesser sequences hold five pages each, four of them the same."""
    plans = scheduler(lanes=4, chunk_tokens=64)
    plans.add(sequence(0, stays))
    plans.plan()
    for number in (1, 2):
        plans.add(sequence(number, [*BEGIN, number], priority=1))
    plans.plan()
    needs = (1 if comes[0] == BEGIN[0] else 5) + 2  # a page to grow into for each that then runs
    plans.pages.take(plans.pages.free - (needs - gain) + (not enough))
    plans.add(sequence(3, comes))
    turn = plans.plan()
    assert [name for name, *_ in segments(turn)] == (["r3"] if enough else [])
    assert plans.preemptions == (2 if enough else 0)
