"""Where a model's thinking ends and its answer begins. Knows text and its offsets; no JSON, no API, no HTTP.

A model that thinks writes `<think>…</think>` before its answer, or goes on behind a `<think>` that its chat template has
written already. One block, at the very start, is thinking; the same words later are part of the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from .generate import Progress, TextToken
from .text import TextTokenizer

PAIRS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
"""How models mark it."""


@dataclass(frozen=True, slots=True)
class Markers:
    """What one model puts around its thinking."""

    open: str
    close: str
    special_ids: frozenset[int] = frozenset()
    """Those of the two that are control tokens, which have no text in an answer unless it is asked for."""

    def left_open(self, prompt: str, resumed: str) -> bool:
        """Whether the model goes on thinking after this prompt.

        Args:
            prompt: as the model sees it; its template may have opened a block at the end.
            resumed: what the message that the model continues says so far; empty if it begins a new one.
        """
        return prompt.rstrip().endswith(self.open) or resumed.rfind(self.open) > resumed.rfind(self.close)


def find_markers(tokenizer: TextTokenizer) -> Markers | None:
    """The markers of a model that thinks: they are tokens of its own, or its chat template speaks of them."""
    template = tokenizer.chat_template or ""
    for pair in PAIRS:
        ids = [_token(tokenizer, marker) for marker in pair]
        if None not in ids or any(marker in template for marker in pair):
            special = frozenset(i for i in ids if i is not None and tokenizer.is_special(i))
            return Markers(*pair, special)
    return None


def _token(tokenizer: TextTokenizer, marker: str) -> int | None:
    ids = tokenizer.encode(marker, False)
    return ids[0] if len(ids) == 1 and tokenizer.token_text(ids[0]) == marker else None


class Split(NamedTuple):
    """Text that became certain: first thinking, then answer."""

    reasoning: str
    text: str


class _State(Enum):
    LOOKING = auto()
    """Nothing but spaces and the beginning of a marker so far."""
    THINKING = auto()
    BETWEEN = auto()
    """Behind the block; the spaces there belong to neither side."""
    ANSWERING = auto()


class Splitter:
    """Splits what one sequence brings."""

    def __init__(self, markers: Markers | None, *, opened: bool = False) -> None:
        """Without markers everything is answer. `opened`: the prompt ends inside a block."""
        self._markers = markers or Markers("", "")
        self._state = _State.ANSWERING if markers is None else _State.THINKING if opened else _State.LOOKING
        self._held = ""
        self._offset = 0
        """Characters of the sequence's text that are no longer held."""
        self._answer_start: int | None = 0 if markers is None else None
        self._starts: list[int] | None = None if markers is None else []
        """Where the tokens so far begin, until it is known which of them are thinking."""
        self._thinking_end = 0
        self._began = False
        self.reasoning_tokens = 0
        """Generated tokens up to the end of the block."""

    @property
    def span(self) -> tuple[int, int]:
        """The answer so far, as offsets in the whole text of the sequence."""
        start = self._offset if self._answer_start is None else self._answer_start
        return start, self._offset

    def of(self, progress: Progress) -> Split:
        """What one progress brings to each side."""
        if self._starts is not None:
            self._starts += [token.start for token in progress.tokens]
        reasoning, text = self._push(progress.text, progress.done is not None)
        if self._starts is not None:
            self._count(self._starts)
        return Split(reasoning, text)

    def _push(self, text: str, end: bool) -> tuple[str, str]:
        self._held += text
        reasoning = ""
        if self._state is _State.LOOKING:
            self._look(end)
        if self._state is _State.THINKING:
            reasoning = self._think(end)
        if self._state is _State.BETWEEN and (self._held.strip() or end):
            self._take(len(self._held) - len(self._held.lstrip()))
            self._answer()
        return reasoning, self._take(len(self._held)) if self._state is _State.ANSWERING else ""

    def _look(self, end: bool) -> None:
        opening, seen = self._markers.open, self._held.lstrip()
        if seen.startswith(opening):
            self._take(len(self._held) - len(seen) + len(opening))
            self._state = _State.THINKING
        elif end or not opening.startswith(seen):
            self._answer()

    def _think(self, end: bool) -> str:
        """The thinking that is certain: no spaces around it, nothing that could become the closing marker."""
        closing = self._markers.close
        at = self._held.find(closing)
        if at >= 0:
            certain = self._take(at).rstrip()
            self._take(len(closing))
            self._thinking_end = self._offset
            self._state = _State.BETWEEN
        else:
            keep = len(self._held) if end else len(self._held) - _partial(self._held, closing)
            certain = self._take(len(self._held[:keep].rstrip()))
        if not self._began:
            certain = certain.lstrip()
            self._began = bool(certain)
        return certain

    def _answer(self) -> None:
        self._state = _State.ANSWERING
        self._answer_start = self._offset

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        self._offset += length
        return taken

    def _count(self, starts: list[int]) -> None:
        if self._state is _State.THINKING:
            self.reasoning_tokens = len(starts)
        elif self._state is not _State.LOOKING:
            self.reasoning_tokens = sum(start < self._thinking_end for start in starts)
            self._starts = None


def visible(tokens: Sequence[TextToken], span: tuple[int, int]) -> list[TextToken]:
    """The tokens whose text lies, at least in part, in this span of the sequence's text."""
    start, end = span
    return [
        token
        for token in tokens
        if not token.special
        and token.start < end
        and (token.start >= start or token.start + len(token.text) > start)
    ]


def _partial(text: str, marker: str) -> int:
    """How much of the marker the text ends with."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
