"""A small real tokenizer for grammars: a token is a byte, a few are joined, two end a text. Real llguidance reads it."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from xlane.models.tokenizer import TextTokenizer, TokenizerFiles

JOINS = (("t", "r"), ("tr", "u"), ("tru", "e"), ("a", "b"), ("ab", "a"), ("1", "2"))
MODEL_VOCAB = 300
"""Of the model beside it: its embedding is padded, as most are."""


def byte_level(
    joins: tuple[tuple[str, str], ...] = JOINS, ends: tuple[str, ...] = ("<eos>", "<eot>")
) -> TextTokenizer:
    """One token for each byte, one for each pair of `joins`, and the special ones that end a text."""
    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in joins:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(joins)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True) for end in ends])
    ids = tuple(tokenizer.token_to_id(end) for end in ends)
    return TextTokenizer(TokenizerFiles(tokenizer, eos_ids=ids))


def token_bytes(tokenizer: TextTokenizer) -> dict[int, bytes]:
    """What each token that is text stands for."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}
    assert set(of) == set(letters)
    return {
        number: bytes(of[letter] for letter in token)
        for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()
        if number not in tokenizer.eos_ids
    }
