"""A model's tokens as llguidance sees them: which bytes each one stands for, and which of them end a text.

For whoever compiles grammars or checks them. Knows no grammar.
"""

from llguidance import LLTokenizer

from .errors import TokenizerError
from .tokenizer import TextTokenizer


def guidance_tokenizer(tokenizer: TextTokenizer, vocab_size: int | None = None) -> LLTokenizer:
    """A tokenizer for grammars. Takes a second for a large vocabulary, so it belongs off any event loop.

    Args:
        tokenizer: the model's.
        vocab_size: the model's, whose embedding may be padded; default the tokenizer's own.

    Raises:
        TokenizerError: it is of a kind that llguidance cannot read, or names no token that ends a text.
    """
    if not tokenizer.eos_ids:
        raise TokenizerError("the tokenizer names no token that ends a text, so no grammar could end one")
    most = max(vocab_size or 0, tokenizer.vocab_size)
    try:
        return LLTokenizer(tokenizer.backend.to_str(), n_vocab=most, eos_token=list(tokenizer.eos_ids))
    except ValueError as error:
        raise TokenizerError(f"the tokenizer cannot be used with grammars: {error}") from error
