"""What people type into a chat stays text: the name of a control token in a message must not become that token.

A template joins its own control tokens and people's words into one text, in which the two look alike. So before that, a BREAK
is put into each such name in people's words; where it lies, the text is cut for encoding, and no control token is found across a cut.
Knows the tokenizer's control tokens; no template, no roles.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

BREAK = "\ufdd0"
"""A code point for programs' own use, which no text has. One that comes with a message is taken out."""


class TypedText:
    """Finds control tokens in texts as the tokenizer itself does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = [token for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._finder = Tokenizer(BPE())  # of no words: it sees control tokens and nothing else
        if tokenizer.normalizer is not None:
            self._finder.normalizer = tokenizer.normalizer
        self._finder.add_special_tokens(special)

    def broken(self, value: Any) -> Any:
        """The value with a BREAK in each control token's name that its texts have, however deep they lie."""
        if isinstance(value, str):
            return BREAK.join(self._pieces(value.replace(BREAK, "")))
        if isinstance(value, Mapping):
            return {self.broken(key): self.broken(each) for key, each in value.items()}
        return [self.broken(each) for each in value] if isinstance(value, list | tuple) else value

    def _pieces(self, text: str) -> list[str]:
        """The text, cut behind the first character of each name until no piece has one."""
        # Like encode(), but other threads run meanwhile.
        found = self._finder.encode_batch([text])[0].offsets
        cuts = [start + 1 for start, stop in found if stop - start > 1]
        if not cuts:
            return [text]
        parts = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [piece for part in parts for piece in self._pieces(part)]
