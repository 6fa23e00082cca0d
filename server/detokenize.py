"""Token ids of one sequence → text: pieces as they become certain, stop strings across token borders, hold-back.

A stop string may begin inside one token and end inside another, so text that could be the beginning of one is held
back until it is clear. Matching looks at each character once, whatever the stop strings are. Knows ids and strings.
"""

from collections.abc import Sequence

from .text import TextTokenizer


class _Matcher:
    """Finds one stop string in a stream of characters (Knuth, Morris, Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Characters of the stop string that the text ends with now."""
        self._fallback = [0] * len(stop)
        length = 0
        for i in range(1, len(stop)):
            while length and stop[i] != stop[length]:
                length = self._fallback[length - 1]
            if stop[i] == stop[length]:
                length += 1
            self._fallback[i] = length

    def feed(self, char: str) -> bool:
        """Whether the stop string ends with this character."""
        while self.matched and self.stop[self.matched] != char:
            self.matched = self._fallback[self.matched - 1]
        if self.stop[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.stop)


class Detokenizer:
    """The text of one sequence. `push` each id, `take` what may be shown, `finish` at the end."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int] = (),
        stops: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
        kept_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        """`kept_ids` are special tokens whose text is wanted in the answer all the same; in the text of the first
        `min_tokens` tokens no stop string begins."""
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(prompt_ids)
        self._matchers = [_Matcher(stop) for stop in stops]
        self._include_stop = include_stop
        self._kept = kept_ids
        self._unstoppable = min_tokens
        """Tokens still to come in which no stop string is looked for; below 0 once one is."""
        self._held = ""
        self._shown: list[str] = []
        self.length = 0
        """Characters decoded so far; a token's text starts here."""
        self.stop: str | None = None
        """The stop string that was found; nothing after it is kept."""

    def push(self, token_id: int) -> str:
        """The whole text of this token, also where part of it lies behind a stop string. Special tokens have a text
        here but none in the answer."""
        self._unstoppable -= 1
        if self.special(token_id):
            return self._tokenizer.token_text(token_id)
        kept = token_id in self._kept
        piece = self._tokenizer.token_text(token_id) if kept else self._stream.push(token_id)
        self._append(piece)
        return piece

    def end(self, token_id: int) -> str:
        """The text of the token that ended the sequence, which is never part of the answer."""
        return self._tokenizer.token_text(token_id)

    def special(self, token_id: int) -> bool:
        """Whether this token has no text in the answer."""
        return token_id not in self._kept and self._tokenizer.is_special(token_id)

    def take(self) -> str:
        """Text that is certain and not shown yet."""
        hold = max((matcher.matched for matcher in self._matchers), default=0) if not self.stopped else 0
        cut = len(self._held) - hold
        if cut <= 0:
            return ""
        text, self._held = self._held[:cut], self._held[cut:]
        self._shown.append(text)
        return text

    def finish(self) -> str:
        """The rest: what was held back for a stop string that did not come, and an incomplete character."""
        if not self.stopped:
            self._append(self._stream.finish())
        self._matchers = []
        return self.take()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop is not None

    @property
    def text(self) -> str:
        """All text taken so far."""
        return "".join(self._shown)

    def _append(self, piece: str) -> None:
        if self.stopped or not piece:
            return
        self._held += piece
        self.length += len(piece)
        if self._matchers and self._unstoppable < 0:
            self._look_for_stops(len(piece))

    def _look_for_stops(self, fresh: int) -> None:
        """Cut the text at the first stop string to end in the last `fresh` characters; of two that end together, at
        the longer one."""
        for end in range(len(self._held) - fresh, len(self._held)):
            char = self._held[end]
            found = [matcher.stop for matcher in self._matchers if matcher.feed(char)]
            if found:
                self.stop = max(found, key=len)
                cut = end + 1 if self._include_stop else end + 1 - len(self.stop)
                self.length -= len(self._held) - cut
                self._held = self._held[:cut]
                return
