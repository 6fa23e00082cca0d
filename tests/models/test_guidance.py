"""Tokenizers as llguidance reads them: the bytes of every kind that is served, ends, padding; what cannot be read is named."""

import pytest
from llguidance import LLTokenizer
from tokenizers import Tokenizer, models

from tests.models.test_gguf_tokenizer import sentencepiece
from tests.support.guided import byte_level, token_bytes
from xlane.models.errors import TokenizerError
from xlane.models.gguf_tokenizer import tokenizer_from_gguf
from xlane.models.guidance import guidance_tokenizer
from xlane.models.tokenizer import TextTokenizer, TokenizerFiles

NEVER = b"\xff"
"""No text in UTF-8 holds it; llguidance marks special tokens with it."""


def test_a_byte_level_tokenizer_gives_each_token_its_bytes() -> None:
    text = byte_level()
    made = guidance_tokenizer(text, 300)
    assert isinstance(made, LLTokenizer)
    assert (made.vocab_size, made.eos_tokens) == (300, list(text.eos_ids))
    for token, piece in token_bytes(text).items():
        assert made.decode_bytes([token]) == piece.replace(NEVER, b"")
    assert made.tokenize_str("true, abab12") == text.encode("true, abab12", add_special_tokens=False)


def test_without_a_models_size_or_with_a_smaller_one_it_is_the_tokenizers() -> None:
    text = byte_level()
    for size in (None, 70):
        assert guidance_tokenizer(text, size).vocab_size == text.vocab_size


def test_a_sentencepiece_tokenizer_gives_spaces_and_single_bytes() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece(), "m")
    text = TextTokenizer(TokenizerFiles(tokenizer, eos_ids=(2,)))
    made = guidance_tokenizer(text)
    for token, number in tokenizer.get_vocab().items():
        if token.startswith("<0x"):
            assert made.decode_bytes([number]) == bytes([int(token[3:5], 16)]).replace(NEVER, b"")
        elif not token.startswith("<"):
            assert made.decode_bytes([number]) == token.replace("▁", " ").encode()


def test_what_cannot_be_used_is_named() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    with pytest.raises(TokenizerError, match=r"cannot be used with grammars: .*decoder"):
        guidance_tokenizer(TextTokenizer(TokenizerFiles(words, eos_ids=(2,))))
    with pytest.raises(TokenizerError, match="names no token that ends a text"):
        guidance_tokenizer(TextTokenizer(TokenizerFiles(words)))
