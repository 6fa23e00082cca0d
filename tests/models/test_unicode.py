"""No half character is ever said: every plane of Unicode, a token at a time, through both kinds of stream and both kinds of
vocabulary that cut characters into bytes."""

from collections.abc import Callable, Iterator

import pytest
from tokenizers import Tokenizer

from xlane.models.detokenize import ByteStream, TextStream, WindowStream, token_table
from xlane.models.gguf_tokenizer import tokenizer_from_gguf

from ..support.unicode_samples import SEQUENCES, sampled
from .test_gguf_tokenizer import bytes_only, sentencepiece

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Open = Callable[[], TextStream]


def _backends() -> Iterator[tuple[str, Tokenizer]]:
    yield "byte-level", tokenizer_from_gguf(bytes_only("gpt-2"), "m")
    yield "byte-fallback", tokenizer_from_gguf(sentencepiece(), "m")


@pytest.fixture(scope="module", params=dict(_backends()).items(), ids=lambda pair: pair[0])
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param[1]


def opener(backend: Tokenizer, kind: str) -> Open:
    """How to begin a stream after the token of "x": a first space would otherwise be the tokenizer's own."""
    context = backend.encode("x", add_special_tokens=False).ids
    if kind == "window":
        return lambda: WindowStream(backend, frozenset(), context)
    table = token_table(backend)
    assert table is not None
    return lambda: ByteStream(table, frozenset(), context)


def pieces(open_stream: Open, ids: list[int]) -> list[str]:
    stream = open_stream()
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def ids_of(backend: Tokenizer, text: str) -> list[int]:
    """The tokens of a text that begins nothing."""
    context = backend.encode("x", add_special_tokens=False).ids
    ids = backend.encode("x" + text, add_special_tokens=False).ids
    assert ids[: len(context)] == context
    return ids[len(context) :]


@pytest.mark.parametrize("plane", range(17))
def test_every_character_comes_whole_with_its_last_token(backend: Tokenizer, plane: int):
    """One in 7: every way to begin a character of any length, and every last byte."""
    fast = opener(backend, "bytes")
    text = sampled(plane, 7)
    ids = ids_of(backend, text)
    said = pieces(fast, ids)
    assert "".join(said) == text
    assert all(len(piece) <= 1 for piece in said), "no token of these holds two characters"
    assert sum(REPLACEMENT in piece for piece in said) == text.count(REPLACEMENT)
    if plane:  # four bytes, a token each, and the character comes with the fourth
        assert said == [x for character in text for x in ("", "", "", character)] + [""]


@pytest.mark.parametrize("plane", range(17))
def test_the_window_says_what_the_table_says(backend: Tokenizer, plane: int):
    text = sampled(plane, 1021).replace(REPLACEMENT, "")
    ids = ids_of(backend, text)
    assert pieces(opener(backend, "window"), ids) == pieces(opener(backend, "bytes"), ids)


@pytest.mark.parametrize("kind", ["bytes", "window"])
@pytest.mark.parametrize("text", SEQUENCES)
def test_what_is_one_sign_to_the_eye_may_be_cut_between_its_characters_only(
    backend: Tokenizer, kind: str, text: str
):
    said = pieces(opener(backend, kind), ids_of(backend, text))
    assert "".join(said) == text
    assert REPLACEMENT not in "".join(said)


def test_a_replacement_character_that_was_meant_is_said(backend: Tokenizer):
    text = f"a{REPLACEMENT}b{REPLACEMENT}"
    assert "".join(pieces(opener(backend, "bytes"), ids_of(backend, text))) == text


@pytest.mark.parametrize("code", [0xD800, 0xDBFF, 0xDC00, 0xDFFF])
def test_bytes_that_would_be_half_a_pair_are_no_character(code: int):
    """UTF-8 has no surrogates: three bytes that spell one are three errors, as in all of Python."""
    backend = tokenizer_from_gguf(bytes_only("gpt-2"), "m")
    table = token_table(backend)
    assert table is not None
    token_of = {table[token_id]: token_id for token_id in range(backend.get_vocab_size())}
    wrong = b"a" + chr(code).encode("utf-8", "surrogatepass") + b"b"
    said = pieces(lambda: ByteStream(table, frozenset()), [token_of[bytes([byte])] for byte in wrong])
    assert "".join(said) == wrong.decode(errors="replace") == f"a{REPLACEMENT * 3}b"
