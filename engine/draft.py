"""Guesses at what a sequence says next: where its newest tokens occurred before, what followed them there may follow again
(prompt lookup, Saxena 2023). Kept up only while it pays. Knows one token list; not how guesses are verified.
"""

LENGTHS = (3, 2)
"""Tokens that must have occurred before, the surest first."""
WORTH = 0.3
"""Accepted guesses a launch below which guessing rests: what a launch costs more for having rows to verify."""
HOPE = 1.0
"""Accepted guesses a launch that are expected before any was made."""
LEAST_REST_TOKENS, MOST_REST_TOKENS = 16, 256
"""How long guessing rests; twice as long each time that another try was no better."""
FORGETTING = 0.25
"""Weight of the newest launch in what is expected of the next."""


class Drafter:
    """Guesses for one sequence. A wrong guess costs a little time and changes nothing else."""

    def __init__(self, tokens: list[int], most: int) -> None:
        """`tokens` is the sequence's own list, which grows; `most` is how many to guess at a time."""
        self._tokens = tokens
        self._most = most
        self._followers: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in LENGTHS)
        """By length: some tokens -> where what followed them last stands."""
        self._indexed = 0
        self._expected = HOPE
        self._rest_tokens = LEAST_REST_TOKENS
        self._rests_until = 0

    @property
    def most(self) -> int:
        """Guesses worth making now; 0 while guessing rests."""
        return self._most if len(self._tokens) >= self._rests_until else 0

    def guess(self) -> list[int]:
        """The next tokens, perhaps: `most` of them, or none."""
        if not self.most:
            return []
        self._index()
        tokens = self._tokens
        for length, followers in zip(LENGTHS, self._followers):
            start = followers.get(tuple(tokens[-length:]))
            if start is not None:
                period = len(tokens) - start  # what runs up to now goes on as it has run
                return [tokens[start + step % period] for step in range(self._most)]
        return []

    def judge(self, accepted: int) -> None:
        """Take in how many guesses of a launch were right; call it after those joined the tokens."""
        self._expected += FORGETTING * (accepted - self._expected)
        if self._expected >= HOPE:
            self._rest_tokens = LEAST_REST_TOKENS
        if self._expected < WORTH:
            self._rests_until = len(self._tokens) + self._rest_tokens
            self._rest_tokens = min(2 * self._rest_tokens, MOST_REST_TOKENS)
            self._expected = (WORTH + HOPE) / 2

    def _index(self) -> None:
        """Note what followed what, for the tokens that came since the last time."""
        count = len(self._tokens)
        for length, followers in zip(LENGTHS, self._followers):
            first = max(self._indexed, length)
            new = self._tokens[first - length : count]
            followers.update(zip(zip(*(new[step:] for step in range(length))), range(first, count)))
        self._indexed = count
