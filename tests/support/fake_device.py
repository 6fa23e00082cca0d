"""A device with hand arithmetic behind the real scheduler and loop: pages, tables and lanes are what the launches say.

It does what `engine/programs.py` does, in Python: keys and values are the tokens themselves, and the next token is computed
from what is read back *through the lane's page table*. A wrong page, a lane shared or a write out of order changes tokens.
Knows no jax; a launch runs when it is made and is read when the reader pleases, as on a real device.
"""

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from xlane.engine import Request, TokenOutput
from xlane.engine.grammar import Guess, bits
from xlane.engine.sequence import Sequence
from xlane.engine.turn import NO_PAGE, Result, Row, Segment, Size, Turn

VOCAB = 64

EMPTY = -1


def next_token(context: list[int], seed: int) -> int:
    """The token after a context: every token and its place count."""
    mixed = seed * 7919 + 17
    for position, token in enumerate(context):
        mixed = (mixed * 31 + token + position) % 1_000_003
    return mixed % VOCAB


def expected_ids(request: Request, most_tokens: int) -> list[int]:
    """The whole output of an undisturbed run, resumed tokens included."""
    context, sampling = list(request.prompt_ids), request.sampling
    guide = None if request.grammar is None else FakeGuide(int(request.grammar))
    while len(context) < min(most_tokens, len(request.prompt_ids) + sampling.max_tokens):
        token = next_token(context, sampling.seed)
        if guide is not None:
            token = guide.allowed()[token % len(guide.allowed())]
            guide.follow([token])
        context.append(token)
        if token in sampling.stop_ids or (guide is not None and token in guide.end_ids):
            break
    return context[len(request.prompt_ids) :]


class FakeGuide:
    """Looks like `grammar.Guide`. Of each five tokens two are chosen among a third of the vocabulary and three are forced;
    after `length` tokens there is nothing but the end. Masks are ready at once, or when the test says `compute`."""

    END = VOCAB - 1
    end_ids = frozenset({END})

    def __init__(self, length: int, late: list["FakeGuide"] | None = None) -> None:
        self._length, self._late = length, late
        self._tokens: list[int] = []
        self.mask: Future[np.ndarray] = Future()
        self.guesses: list[Guess] = []
        self.compute()

    def allowed(self, ahead: int = 0) -> list[int]:
        """The tokens that may be next, or so many later."""
        at = len(self._tokens) + ahead
        if at >= self._length:
            return [self.END]
        if at % 5 >= 2:
            return [(7 * at) % self.END]
        return [token for token in range(self.END) if token % 3 == at % 3]

    def follow(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            assert token in self.allowed()
            self._tokens.append(token)

    def forced(self, most: int, *, may_end: bool = True) -> list[int]:
        made: list[int] = []
        while len(made) < most and len(allowed := self.allowed()) == 1:
            if allowed == [self.END]:
                return [*made, self.END] if may_end else made
            self.follow(allowed)
            made += allowed
        return made

    def prepare(self, most_guesses: int = 0, others: Iterable[int] = ()) -> None:
        self.mask = Future()
        self.guesses = []
        for ahead, token in zip(range(most_guesses), others):
            if token not in self.allowed(ahead) or token in self.end_ids:
                break
            self.guesses.append(Guess(token, bits(self.allowed(ahead + 1), VOCAB)))
        if self._late is None:
            self.compute()
        else:
            self._late.append(self)

    def compute(self) -> None:
        self.mask.set_result(bits(self.allowed(), VOCAB))


class Oracle:
    """Looks like `draft.Drafter`. Knows what a sequence will say, and is right but where it shall `lie`."""

    def __init__(self, sequence: Sequence, most: int, most_tokens: int, lie: Callable[[int], bool]) -> None:
        self.most, self._sequence, self._lie = most, sequence, lie
        self._text = [*sequence.request.prompt_ids, *expected_ids(sequence.request, most_tokens)]
        self.judged: list[int] = []

    def guess(self) -> list[int]:
        at = len(self._sequence.tokens)
        return [
            (token + 3) % FakeGuide.END if self._lie(at + step) else token
            for step, token in enumerate(self._text[at : at + self.most])
        ]

    @property
    def hopes(self) -> bool:
        return bool(self.guess())

    def offer(self, tokens: list[int]) -> None:
        assert tokens == []  # there are no heads on this device

    def judge(self, accepted: int) -> None:
        self.judged.append(accepted)


@dataclass
class Lane:
    """What the device knows of one lane."""

    table: list[int] = field(default_factory=list)
    token: int = EMPTY
    position: int = 0
    remaining: int = 0
    active: bool = False
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    counted: list[int] = field(default_factory=list)
    """Tokens recorded for penalties, in order; what is recorded twice would be in it twice."""


@dataclass
class FakeLaunch:
    """Looks like `runner.Launch`."""

    results: list[tuple[Sequence, Result]]
    size: Size
    behind: int
    before_read: Callable[[], None] = lambda: None
    prompts: list[tuple[Sequence, list[TokenOutput]]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.size.rows

    @property
    def prompt_tokens(self) -> int:
        return self.size.tokens

    def read_prompts(self) -> list[tuple[Sequence, list[TokenOutput]]]:
        return self.prompts

    def read(self) -> list[tuple[Sequence, Result, list[int]]]:
        self.before_read()
        return [(sequence, made, []) for sequence, made in self.results]


class FakeDevice:
    """Looks like `runner.Runner`."""

    def __init__(self, lanes: int, pages: int, page_tokens: int, table_width: int) -> None:
        self.lanes = [Lane(table=[EMPTY] * table_width) for _ in range(lanes)]
        self.pool = [[EMPTY] * page_tokens for _ in range(pages)]
        self.page_tokens = page_tokens
        self.turns = 0
        self.before_launch: Callable[[Turn], None] = lambda turn: None
        self.before_read: Callable[[], None] = lambda: None

    def launch(self, turn: Turn) -> FakeLaunch | None:
        self.before_launch(turn)
        self.turns += 1
        if not turn.rows and not turn.segments:
            return None
        assert not turn.segments or not any(row.ahead for row in turn.rows)
        lanes = [
            *(row.lane for row in turn.rows if not row.ahead),
            *(segment.lane for segment in turn.segments),
        ]
        assert len(lanes) == len(set(lanes))  # they run side by side: none sees what another makes
        by_sequence = itertools.groupby(zip(turn.decoded, turn.rows), lambda one: one[0])
        results = [(one, self._rows(one, [row for _, row in group])) for one, group in by_sequence]
        for segment, sequence in zip(turn.segments, turn.prefilled):
            token = self._segment(segment, sequence)
            if token is not None:
                results.append((sequence, (token,)))
        prompts = [
            (sequence, [TokenOutput(target, -1.0) for target in segment.targets if target >= 0])
            for segment, sequence in zip(turn.segments, turn.prefilled)
        ]
        count = sum(len(segment.tokens) for segment in turn.segments)
        return FakeLaunch(results, Size(len(turn.rows), count), turn.behind, self.before_read, prompts)

    def _segment(self, segment: Segment, sequence: Sequence) -> TokenOutput | None:
        lane = self.lanes[segment.lane]
        if segment.start == 0:
            lane.counted = []
        lane.counted += segment.tokens[max(0, segment.recorded - segment.start) :]
        lane.table = [*segment.pages, *[0] * (len(lane.table) - len(segment.pages))]
        lane.stop_ids, lane.seed = segment.sampling.stop_ids, segment.sampling.seed
        lane.active, lane.position = False, segment.start
        for token in segment.tokens:
            self._write(lane, token)
        lane.remaining = segment.remaining
        if sequence.counts:
            assert lane.counted == sequence.tokens[: lane.position]
        return self._sample(lane, sequence) if segment.last else None

    def _rows(self, sequence: Sequence, rows: list[Row]) -> Result:
        lane = self.lanes[rows[0].lane]
        assert [row.ahead for row in rows] == list(range(len(rows)))
        for row in rows:
            if row.page != NO_PAGE:
                lane.table[row.page_index] = row.page
        if not lane.active:
            return None
        for row in rows[1:]:
            self._put(lane, lane.position + row.ahead, row.guess)
        made: list[TokenOutput] = []
        for row in rows:
            if row.ahead and not (lane.active and lane.token == row.guess):
                break
            self._write(lane, lane.token)
            made.append(self._sample(lane, sequence, row.ahead))
        return tuple(made)

    def _write(self, lane: Lane, token: int) -> None:
        self._put(lane, lane.position, token)
        lane.position += 1

    def _put(self, lane: Lane, position: int, token: int) -> None:
        self.pool[lane.table[position // self.page_tokens]][position % self.page_tokens] = token

    def _sample(self, lane: Lane, sequence: Sequence, ahead: int = 0) -> TokenOutput:
        width = self.page_tokens
        context = [self.pool[lane.table[at // width]][at % width] for at in range(lane.position)]
        lane.token = next_token(context, lane.seed)
        if sequence.guide is not None:
            mask = sequence.guide.guesses[ahead - 1].mask if ahead else sequence.guide.mask.result(0)
            allowed = [token for token in range(VOCAB) if mask[token // 32] >> (token % 32) & 1]
            lane.token = allowed[lane.token % len(allowed)]
        lane.counted.append(lane.token)
        lane.remaining -= 1
        lane.active = lane.remaining > 0 and lane.token not in lane.stop_ids
        return TokenOutput(lane.token)
