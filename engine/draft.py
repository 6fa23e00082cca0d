"""Guesses at what a sequence says next, and whether they pay.

Two sources: where its newest tokens occurred before, what followed them there may follow again (prompt lookup, Saxena 2023);
and what draft heads, if there are any, offered with the newest token. Each is used only while it pays. Knows one token list;
not how guesses are made on the device, nor how they are verified.
"""

LENGTHS = (3, 2)
"""Tokens that must have occurred before, the surest first."""
WORTH = 0.3
"""Accepted guesses a launch below which guessing rests: what a launch costs more for having rows to verify."""
HOPE = 1.0
"""Accepted guesses a launch that are expected before any was made."""
LEAST_REST_TOKENS, MOST_REST_TOKENS = 16, 256
"""How long guessing rests; twice as long each time that another try was no better."""
FORGETTING, HEADS_FORGETTING = 0.25, 0.1
"""Weight of the newest launch in what is expected of the next: what was found repeats itself or does not; heads, which offer
nothing where they are not sure themselves, are right now and then everywhere."""
NO_GUESS = -1
"""What heads offer where it would not be worth its launch."""


class Drafter:
    """Guesses for one sequence. A wrong guess costs a little time and changes nothing else."""

    def __init__(self, tokens: list[int], most: int, heads: bool = False) -> None:
        """`tokens` is the sequence's own list, which grows; `most` is how many to guess at a time; `heads`: whether draft
        heads offer guesses, too."""
        self._tokens = tokens
        self._most = most
        self._followers: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in LENGTHS)
        """By length: some tokens -> where what followed them last stands."""
        self._indexed = 0
        self._found, self._heads = _Worth(FORGETTING), _Worth(HEADS_FORGETTING) if heads else None
        self._used = self._found
        """Where the newest guess came from."""
        self._offered: list[int] = []
        self._offered_at = 0

    @property
    def most(self) -> int:
        """Guesses worth making now; 0 while guessing rests."""
        length = len(self._tokens)
        rest = self._found.rests(length) and (self._heads is None or self._heads.rests(length))
        return 0 if rest else self._most

    @property
    def hopes(self) -> bool:
        """Whether there may be a guess once the next token is there."""
        if self._heads is not None and not self._heads.rests(len(self._tokens)):
            return True
        return bool(self.guess())

    def offer(self, tokens: list[int]) -> None:
        """What draft heads guess to follow the tokens as they are now."""
        self._offered, self._offered_at = tokens[: self._most], len(self._tokens)

    def guess(self) -> list[int]:
        """The next tokens, perhaps: at most `most` of them, or none. Of two guesses the one whose like did better."""
        length = len(self._tokens)
        found = [] if self._found.rests(length) else self._find()
        offered = self._offered if self._offered_at == length else []
        heads = None if self._heads is None or self._heads.rests(length) else self._heads
        if heads is not None and offered and (not found or heads.expected > self._found.expected):
            self._used = heads
            return offered
        self._used = self._found
        return found

    def judge(self, accepted: int) -> None:
        """Take in how many guesses of a launch were right; call it after those joined the tokens."""
        self._used.judge(accepted, len(self._tokens))

    def _find(self) -> list[int]:
        self._index()
        tokens = self._tokens
        for length, followers in zip(LENGTHS, self._followers):
            start = followers.get(tuple(tokens[-length:]))
            if start is not None:
                period = len(tokens) - start  # what runs up to now goes on as it has run
                return [tokens[start + step % period] for step in range(self._most)]
        return []

    def _index(self) -> None:
        """Note what followed what, for the tokens that came since the last time."""
        count = len(self._tokens)
        for length, followers in zip(LENGTHS, self._followers):
            first = max(self._indexed, length)
            new = self._tokens[first - length : count]
            followers.update(zip(zip(*(new[step:] for step in range(length))), range(first, count)))
        self._indexed = count


class _Worth:
    """What guesses of one source are worth for one sequence."""

    def __init__(self, forgetting: float) -> None:
        self._forgetting = forgetting
        self.expected = HOPE
        """Accepted guesses of the next launch."""
        self._rest_tokens = LEAST_REST_TOKENS
        self._rests_until = 0

    def rests(self, length: int) -> bool:
        """Whether a sequence of this length had better not ask for any."""
        return length < self._rests_until

    def judge(self, accepted: int, length: int) -> None:
        """Take in how many of a launch were right, which made the sequence this long."""
        self.expected += self._forgetting * (accepted - self.expected)
        if self.expected >= HOPE:
            self._rest_tokens = LEAST_REST_TOKENS
        if self.expected < WORTH:
            self._rests_until = length + self._rest_tokens
            self._rest_tokens = min(2 * self._rest_tokens, MOST_REST_TOKENS)
            self.expected = (WORTH + HOPE) / 2
