"""Guesses from what a sequence said before: the right place is found, and guessing stops where it does not pay."""

from hypothesis import given
from hypothesis import strategies as st

from xlane.engine.draft import FORGETTING, HOPE, LENGTHS, MOST_REST_TOKENS, WORTH, Drafter


def looked_up(tokens: list[int], most: int) -> list[int]:
    """The same by looking through the whole text, the newest place first, and writing on at its end."""
    for length in LENGTHS:
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                text = list(tokens)
                for step in range(most):
                    text.append(text[start + length + step])
                return text[len(tokens) :]
    return []


@given(
    text=st.lists(st.integers(0, 3), max_size=40), cuts=st.sets(st.integers(0, 40)), most=st.integers(1, 9)
)
def test_a_guess_is_what_followed_the_newest_tokens_when_they_occurred_last(
    text: list[int], cuts: set[int], most: int
) -> None:
    tokens: list[int] = []
    drafter = Drafter(tokens, most)
    for at, token in enumerate(text):
        if at in cuts:  # not every token is looked at as it comes
            assert drafter.guess() == looked_up(tokens, most)
        tokens.append(token)
    assert drafter.guess() == looked_up(tokens, most)


def test_three_equal_tokens_are_surer_than_two() -> None:
    assert Drafter([7, 1, 2, 3, 4, 1, 2, 9, 7, 1, 2], 2).guess() == [3, 4]
    assert Drafter([7, 1, 2, 3, 4, 1, 2, 9, 8, 1, 2], 2).guess() == [9, 8]


def test_what_repeats_is_guessed_to_go_on_repeating() -> None:
    assert Drafter([5, 5, 5], 4).guess() == [5] * 4
    assert Drafter([9, 1, 2, 1, 2], 5).guess() == [1, 2, 1, 2, 1]


def test_guessing_rests_where_it_does_not_pay_and_longer_each_time() -> None:
    tokens = [1, 2] * 4
    drafter = Drafter(tokens, 3)
    rests = []
    for _ in range(8):
        while drafter.guess():
            drafter.judge(0)
        assert drafter.most == 0
        start = len(tokens)
        while not drafter.guess():
            tokens.append(1 + len(tokens) % 2)
        rests.append(len(tokens) - start)
    assert rests == [16, 32, 64, 128, 256, 256, 256, 256]
    assert rests[-1] == MOST_REST_TOKENS


def test_few_wrong_guesses_are_borne_and_right_ones_forgive_them() -> None:
    tokens = [1, 2] * 4
    drafter = Drafter(tokens, 3)
    expected = HOPE
    while (expected := expected * (1 - FORGETTING)) >= WORTH:
        drafter.judge(0)
        assert drafter.guess()
    drafter.judge(3)
    drafter.judge(0)
    assert drafter.guess()
    for _ in range(100):  # one right guess in three launches pays
        for accepted in (1, 0, 0, 3):
            drafter.judge(accepted)
        assert drafter.guess()


def test_what_heads_offer_is_taken_where_nothing_was_found_and_for_these_tokens_only() -> None:
    tokens = [1, 2, 3]
    drafter = Drafter(tokens, 2, heads=True)
    assert drafter.hopes  # heads will offer something with the next token
    drafter.offer([7, 8, 9])
    assert drafter.guess() == [7, 8]
    tokens.append(7)
    assert drafter.guess() == []
    assert not Drafter([1, 2, 3], 2).hopes


def test_of_two_guesses_the_one_whose_like_did_better_is_taken_and_each_rests_for_itself() -> None:
    tokens = [1, 2, 9, 1, 2]
    drafter = Drafter(tokens, 1, heads=True)
    drafter.offer([5])
    assert drafter.guess() == [9]  # as good as each other so far
    drafter.judge(0)
    assert drafter.guess() == [5]
    drafter.judge(1)
    assert drafter.guess() == [5]
    while drafter.guess() == [5]:
        drafter.judge(0)
    while drafter.guess():
        drafter.judge(0)
    assert drafter.most == 0
    tokens += [1, 2, 9, 1, 2] * 4
    drafter.offer([5])
    assert drafter.most == 1
