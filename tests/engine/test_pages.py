"""The allocator: nothing handed out twice, nothing lost, all or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlane.engine.pages import PageAllocator, pages_for


def test_pages_are_handed_out_once_and_come_back() -> None:
    pages = PageAllocator(5)
    first, second = pages.take(2), pages.take(3)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == list(range(5))
    assert (pages.free, pages.take(1)) == (0, None)
    pages.give_back(second)
    assert pages.free == 3
    third = pages.take(3)
    assert third is not None
    assert sorted(third) == sorted(second)


def test_too_many_is_none_and_changes_nothing() -> None:
    pages = PageAllocator(3)
    assert pages.take(4) is None
    assert pages.free == 3
    assert pages.take(0) == []


def test_the_page_freed_last_is_used_first() -> None:
    pages = PageAllocator(8)
    held = pages.take(4)
    assert held is not None
    pages.give_back([held[2]])
    assert pages.take(1) == [held[2]]


@pytest.mark.parametrize("given_back", [[1, 1], [7]])
def test_what_nobody_holds_cannot_be_given_back(given_back: list[int]) -> None:
    pages = PageAllocator(8)
    held = pages.take(2)
    assert held == [0, 1]
    with pytest.raises(ValueError, match="nobody holds it"):
        pages.give_back(given_back)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_free_and_held_are_always_all(steps: list[tuple[bool, int]]) -> None:
    pages, held = PageAllocator(12), []
    for take, count in steps:
        if take:
            got = pages.take(count)
            assert (got is None) == (count > 12 - len(held))
            held += got or []
        else:
            pages.give_back(held[:count])
            held = held[count:]
        assert len(set(held)) == len(held) == 12 - pages.free


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 4) == pages
