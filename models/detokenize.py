"""Text out of ids, token by token: what is certain is said at once, half a character never. Knows no requests.

Nearly every tokenizer turns a token into bytes without looking at its neighbours (byte-level BPE; SentencePiece with
byte fallback). For those a stream is a table look-up and an incremental UTF-8 decoder. Any other decoder is asked again
for the last few tokens at each step.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

SPACE = "▁"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MOST_PENDING = 16
"""Tokens after which a text that still ends in a replacement character is taken to mean one."""
CONTEXT = 8
"""Tokens of the prompt that can still matter: they may end in half a character, or decide on a space."""


class TextStream(Protocol):
    """The text of one sequence as its tokens arrive."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        ...

    def finish(self) -> str:
        """What was held back: replacement characters for a character that never became whole."""
        ...


class TokenTable:
    """The bytes of each token, for tokenizers where a token has bytes of its own. Filled as tokens are met."""

    def __init__(self, tokenizer: Tokenizer, to_bytes: Callable[[str], bytes], strips: bool) -> None:
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        self._known: dict[int, bytes] = {}
        self.strips = strips
        """A text loses one space at its beginning."""

    def __getitem__(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            # Ids beyond the vocabulary (a padded embedding can yield them) have no text, as in `Tokenizer.decode`.
            token = self._tokenizer.id_to_token(token_id)
            found = self._known[token_id] = b"" if token is None else self._to_bytes(token)
        return found


def token_table(tokenizer: Tokenizer) -> TokenTable | None:
    """A table if the tokenizer's decoder works token by token, else None."""
    if tokenizer.decoder is None:
        return None
    steps = _steps(json.loads(tokenizer.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenTable(tokenizer, _byte_level_bytes, strips=False)
    sentencepiece = ["Replace", "ByteFallback", "Fuse"]
    plain = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:3] == sentencepiece and steps[0] == plain and steps[3:] in ([], [strip]):
        return TokenTable(tokenizer, _sentencepiece_bytes, strips=len(steps) == 4)
    return None


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as printable characters: those that are print themselves, the rest follow 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # an added token is written as it is
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(SPACE, " ").encode()


class ByteStream:
    """A `TextStream` over a table of bytes."""

    def __init__(self, table: TokenTable, skip: frozenset[int], prompt_ids: Sequence[int] = ()) -> None:
        """Begin after a prompt. Tokens in `skip` have no text."""
        self._table, self._skip = table, skip
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        shown = [token_id for token_id in prompt_ids if token_id not in skip]
        self._decode(b"".join(table[token_id] for token_id in shown[-CONTEXT:]))
        self._strip = table.strips and not shown

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if token_id in self._skip:
            return ""
        return self._begin(self._decode(self._table[token_id]))

    def finish(self) -> str:
        """A replacement character for the bytes held back, if there are any."""
        return self._begin(self._decode(b"", True))

    def _begin(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class WindowStream:
    """A `TextStream` for any decoder: what decoding the last tokens gives, less what decoding all but the newest gave."""

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int], prompt_ids: Sequence[int] = ()) -> None:
        """Begin after a prompt. Tokens in `skip` have no text."""
        self._tokenizer, self._skip = tokenizer, skip
        self._ids = [token_id for token_id in prompt_ids if token_id not in skip][-CONTEXT:]
        self._said = len(self._ids)
        self._text = self._decoded(self._ids)
        """The decoding of the first `_said` ids."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if token_id in self._skip:
            return ""
        self._ids.append(token_id)
        text = self._decoded(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._said < MOST_PENDING:
            return ""
        return self._say(text)

    def finish(self) -> str:
        """The text of tokens held back, if there are any."""
        return self._say(self._decoded(self._ids))

    def _say(self, text: str) -> str:
        new = text[len(self._text) :]
        # What is said stays as context for one more round: a decoder treats the first token of a text differently.
        self._ids = self._ids[self._said :] or self._ids
        self._said = len(self._ids)
        self._text = self._decoded(self._ids)
        return new

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
