"""An answer that keeps to a grammar, byte by byte, chosen so that it ends soon: for an engine without a model.

Of the bytes that a grammar allows, the first of `PREFERRED` is taken; where it may end, it ends.
"""

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from .byte_tokenizer import BOS, EOS, SPECIAL

PREFERRED = b'"}]1,:' + bytes(range(33, 256)) + b" \n"


class _Bytes:
    """The byte tokenizer, as llguidance wants it."""

    bos_token_id, eos_token_id = BOS, EOS
    special_token_ids = tuple(SPECIAL)
    tokens = [bytes([i]) for i in range(256)] + [b"\xff" + name.encode() for name in SPECIAL.values()]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def allows(grammar: str | None, text: str) -> bool:
    """Whether a text is a whole answer."""
    assert grammar is not None
    matcher = _matcher(grammar)
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def obedient_ids(grammar: str, max_tokens: int) -> list[int]:
    """The bytes of an answer, at most so many; fewer end with EOS."""
    matcher = _matcher(grammar)
    ids: list[int] = []
    while len(ids) < max_tokens:
        if matcher.is_accepting():
            return [*ids, EOS]
        biases = matcher.compute_logit_bias()
        token = next(byte for byte in PREFERRED if biases[byte])
        assert matcher.consume_token(token), matcher.get_error()
        ids.append(token)
    return ids


def _matcher(grammar: str) -> LLMatcher:
    matcher = LLMatcher(TOKENIZER, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher
