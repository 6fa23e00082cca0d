"""A prompt with its own log-probabilities, as tokens with text. Knows ids and text; no API.

Slow enough to be felt for a long prompt, so callers have it done on a text worker.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..engine import TokenOutput
from .detokenize import Detokenizer
from .generate import TextToken
from .text import TextTokenizer


def prompt_tokens(
    tokenizer: TextTokenizer, ids: Sequence[int], scored: Sequence[TokenOutput]
) -> list[TextToken]:
    """All tokens of a prompt; the first has no log-probability.

    Args:
        tokenizer: gives them their texts, which together are the prompt's.
        ids: the prompt.
        scored: what the engine said of them, from the second on.
    """
    text = Detokenizer(tokenizer)
    tokens: list[TextToken] = []
    for token in (TokenOutput(ids[0]), *scored):
        start = text.length
        piece = text.push(token.id)
        tokens.append(TextToken(token.id, piece, text.special(token.id), start, token.logprob, token.top))
    return tokens


def moved(tokens: Sequence[TextToken], characters: int) -> Sequence[TextToken]:
    """The same tokens, behind a text of so many characters."""
    return [replace(token, start=token.start + characters) for token in tokens] if characters else tokens
