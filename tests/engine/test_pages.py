"""The allocator: nothing handed out twice, nothing lost, all or nothing; what is remembered is what was written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xlane.engine.pages import PageAllocator, chain, pages_for


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


def keys(*tokens: int, salt: bytes = b"") -> list[bytes]:
    """Of pages of two tokens."""
    known: list[bytes] = []
    chain(tokens, 2, known, salt)
    return known


def test_a_key_names_a_page_and_all_before_it() -> None:
    one = keys(1, 2, 3, 4, 5)
    assert len(one) == 2, "only full pages have keys"
    assert keys(1, 2, 3, 4) == one
    assert keys(1, 2, 3, 5)[0] == one[0]
    assert keys(1, 2, 3, 5)[1] != one[1]
    assert keys(9, 2, 3, 4)[1] != one[1], "the same page after another beginning is another page"
    assert not set(keys(1, 2, 3, 4, salt=b"a")) & set(one)


def test_a_chain_is_extended_not_made_again() -> None:
    known = keys(1, 2)
    chain([1, 2, 3, 4], 2, known)
    assert known == keys(1, 2, 3, 4)


def test_a_page_is_found_after_its_holder_is_gone_and_shared_again() -> None:
    pages, known = PageAllocator(4), keys(1, 2, 3, 4)
    held = pages.take(2)
    assert held is not None
    for page, key in zip(held, known):
        pages.remember(page, key)
    pages.give_back(held)
    assert (pages.free, pages.remembered) == (4, 2)
    assert pages.find([*known, b"unknown"]) == held
    assert pages.idle(held) == 2
    pages.share(held)
    pages.share(held)
    assert (pages.free, pages.idle(held)) == (2, 0)
    pages.give_back(held)
    assert pages.free == 2, "another holder is left"
    pages.give_back(held)
    assert pages.free == 4


def test_the_end_of_the_longest_unused_chain_is_forgotten_first() -> None:
    pages, old, new = PageAllocator(4), keys(1, 2, 3, 4), keys(5, 6, 7, 8)
    for known in (old, new):
        held = pages.take(2)
        assert held is not None
        for page, key in zip(held, known):
            pages.remember(page, key)
        pages.give_back(held)
    kept = pages.find(old)
    pages.take(1)
    assert pages.find(old) == kept[:1]
    assert len(pages.find(new)) == 2
    pages.take(1)
    assert pages.find(old) == []
    assert pages.evictions == 2


def test_using_a_chain_keeps_it() -> None:
    pages, old, new = PageAllocator(2), keys(1, 2), keys(5, 6)
    for known in (old, new):
        held = pages.take(1)
        assert held is not None
        pages.remember(held[0], known[0])
        pages.give_back(held)
    found = pages.find(old)
    pages.share(found)
    pages.give_back(found)
    pages.take(1)
    assert pages.find(old) == found
    assert pages.find(new) == []


def test_what_turned_out_bad_is_not_found() -> None:
    pages, known = PageAllocator(2), keys(1, 2)
    held = pages.take(1)
    assert held is not None
    pages.remember(held[0], known[0])
    pages.disown(held)
    assert pages.find(known) == []
    pages.give_back(held)
    assert (pages.free, pages.remembered) == (2, 0)


class Sharing(RuleBasedStateMachine):
    """Sequences of few different tokens come and go over a small pool that remembers them; contents are written down."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(7)
        self.content: dict[int, tuple[int, ...]] = {}
        self.held: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), max_size=8))
    def arrive(self, tokens: list[int]) -> None:
        known = keys(*tokens)
        found = self.pages.find(known)
        for index, page in enumerate(found):
            assert self.content[page] == tuple(tokens[: 2 * index + 2]), "found what was written there"
        missing = pages_for(len(tokens), 2) - len(found)
        if missing > self.pages.free - self.pages.idle(found):
            return
        self.pages.share(found)
        fresh = self.pages.take(missing)
        assert fresh is not None
        for index, page in enumerate([*found, *fresh]):
            if index >= len(found):
                assert all(page not in pages for pages, _ in self.held), "a page to write to is nobody else's"
                self.content[page] = tuple(tokens[: 2 * index + 2])
            if index < len(known):
                self.pages.remember(page, known[index])
        self.held.append(([*found, *fresh], tokens))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        pages, _ = self.held.pop(which % len(self.held))
        self.pages.give_back(pages)

    @invariant()
    def all_pages_are_held_or_free(self) -> None:
        held = {page for pages, _ in self.held for page in pages}
        assert self.pages.free == 7 - len(held)
        for pages, tokens in self.held:
            for index, page in enumerate(pages):
                assert self.content[page] == tuple(tokens[: 2 * index + 2]), "nobody wrote to a page in use"


TestSharing = Sharing.TestCase
