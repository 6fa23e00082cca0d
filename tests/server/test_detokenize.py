"""Pieces, stop strings and hold-back, against plain string search on the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlane.server.detokenize import Detokenizer

from ..support.byte_tokenizer import EOS, ByteTokenizer


class Words(ByteTokenizer):
    """Tokens of several characters: id i is the i-th of the given pieces."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def stream(self, prompt_ids=()):
        pieces = self._pieces

        class Stream:
            def push(self, token_id: int) -> str:
                return pieces[token_id]

            def finish(self) -> str:
                return ""

        return Stream()

    def is_special(self, token_id: int) -> bool:
        return False


def run(
    pieces: list[str], stops: tuple[str, ...], *, include_stop: bool = False
) -> tuple[list[str], Detokenizer]:
    """What is shown after each token, and at the end."""
    text = Detokenizer(Words(pieces), (), stops, include_stop=include_stop)
    shown: list[str] = []
    for i in range(len(pieces)):
        text.push(i)
        shown.append(text.take())
        if text.stopped:
            break
    shown.append(text.finish())
    return shown, text


def test_text_is_shown_at_once_without_stops():
    assert run(["Hel", "lo", "!"], ())[0] == ["Hel", "lo", "!", ""]


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_clear():
    shown, text = run(["one S", "TO", "ne"], ("STOP",))
    assert shown == ["one ", "", "STOne", ""]
    assert not text.stopped


def test_what_is_held_back_is_shown_at_the_end():
    assert run(["ab", "c"], ("cd",))[0] == ["ab", "", "c"]


@pytest.mark.parametrize(("include", "expected"), [(False, "one "), (True, "one STOP")])
def test_a_stop_string_across_tokens_ends_the_text(include: bool, expected: str):
    shown, text = run(["one S", "TO", "P and more", "never"], ("STOP",), include_stop=include)
    assert "".join(shown) == text.text == expected
    assert text.stopped
    assert text.length == len(expected)


def test_the_stop_string_that_ends_first_wins_and_of_two_that_end_together_the_longer():
    assert run(["xabcd"], ("bcd", "ab"))[1].text == "x"
    assert run(["xab"], ("b", "ab"))[1].text == "x"


def test_a_stop_string_that_overlaps_itself():
    assert run(["aab", "aaa", "b"], ("aabaaab",))[1].text == ""
    assert run(["a"] * 5 + ["b"], ("aab",))[1].text == "aaa"


def test_characters_made_of_several_tokens_come_whole():
    text = Detokenizer(ByteTokenizer())
    shown = []
    for byte in "né🙂".encode():
        text.push(byte)
        shown.append(text.take())
    assert shown == ["n", "", "é", "", "", "", "🙂"]
    assert text.finish() == ""


def test_half_a_character_at_the_end_is_replaced():
    text = Detokenizer(ByteTokenizer())
    assert text.push("é".encode()[0]) == ""
    assert text.finish() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_have_a_text_of_their_own_but_none_in_the_answer():
    text = Detokenizer(ByteTokenizer())
    assert text.push(EOS) == "<eos>"
    assert text.take() == ""


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_token_borders_make_no_difference(pieces: list[str], stops: list[str]):
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), -len(stop)) for stop in stops if stop in whole]
    end, length = min(ends) if ends else (len(whole), 0)
    shown, text = run(pieces, tuple(stops))
    assert "".join(shown) == whole[: end + length]
    assert text.stopped == bool(ends)
    assert run(pieces, tuple(stops), include_stop=True)[1].text == whole[:end]
