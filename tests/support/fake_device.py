"""A device with hand arithmetic behind the real scheduler and loop: pages, tables and lanes are what the launches say.

It does what `engine/programs.py` does, in Python: keys and values are the tokens themselves, and the next token is computed
from what is read back *through the lane's page table*. A wrong page, a lane shared or a write out of order changes tokens.
Knows no jax; a launch runs when it is made and is read when the reader pleases, as on a real device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from xlane.engine import Request, TokenOutput
from xlane.engine.sequence import Sequence
from xlane.engine.turn import NO_PAGE, Segment, Turn

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
    while len(context) < min(most_tokens, len(request.prompt_ids) + sampling.max_tokens):
        context.append(next_token(context, sampling.seed))
        if context[-1] in sampling.stop_ids:
            break
    return context[len(request.prompt_ids) :]


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


@dataclass
class FakeLaunch:
    """Looks like `runner.Launch`."""

    results: list[tuple[Sequence, TokenOutput | None]]
    prompt_tokens: int
    before_read: Callable[[], None] = lambda: None
    prompts: list[tuple[Sequence, list[TokenOutput]]] = field(default_factory=list)

    def read_prompts(self) -> list[tuple[Sequence, list[TokenOutput]]]:
        return self.prompts

    def read(self) -> list[tuple[Sequence, TokenOutput | None]]:
        self.before_read()
        return self.results


class FakeDevice:
    """Looks like `runner.Runner`."""

    def __init__(self, lanes: int, pages: int, page_tokens: int, table_width: int) -> None:
        self.lanes = [Lane(table=[EMPTY] * table_width) for _ in range(lanes)]
        self.pool = [[EMPTY] * page_tokens for _ in range(pages)]
        self.page_tokens = page_tokens
        self.turns = 0
        self.before_launch: Callable[[Turn], None] = lambda turn: None
        self.before_read: Callable[[], None] = lambda: None

    def launch(self, turn: Turn) -> list[FakeLaunch]:
        self.before_launch(turn)
        self.turns += 1
        launches = []
        if turn.segments:
            made = [self._segment(segment) for segment in turn.segments]
            ended = [
                (sequence, token)
                for segment, sequence, token in zip(turn.segments, turn.prefilled, made)
                if segment.last
            ]
            count = sum(len(segment.tokens) for segment in turn.segments)
            prompts = [
                (sequence, [TokenOutput(target, -1.0) for target in segment.targets if target >= 0])
                for segment, sequence in zip(turn.segments, turn.prefilled)
            ]
            launches.append(FakeLaunch(ended, count, self.before_read, prompts))
        if turn.rows:
            results = [(sequence, self._row(*row)) for row, sequence in zip(turn.rows, turn.decoded)]
            launches.append(FakeLaunch(results, 0, self.before_read))
        return launches

    def _segment(self, segment: Segment) -> TokenOutput | None:
        lane = self.lanes[segment.lane]
        lane.table = [*segment.pages, *[0] * (len(lane.table) - len(segment.pages))]
        lane.stop_ids, lane.seed = segment.sampling.stop_ids, segment.sampling.seed
        lane.active, lane.position = False, segment.start
        for token in segment.tokens:
            self._write(lane, token)
        lane.remaining = segment.remaining
        return self._sample(lane) if segment.last else None

    def _row(self, number: int, page_index: int, page: int) -> TokenOutput | None:
        lane = self.lanes[number]
        if page != NO_PAGE:
            lane.table[page_index] = page
        if not lane.active:
            return None
        self._write(lane, lane.token)
        return self._sample(lane)

    def _write(self, lane: Lane, token: int) -> None:
        page = lane.table[lane.position // self.page_tokens]
        self.pool[page][lane.position % self.page_tokens] = token
        lane.position += 1

    def _sample(self, lane: Lane) -> TokenOutput:
        width = self.page_tokens
        context = [self.pool[lane.table[at // width]][at % width] for at in range(lane.position)]
        lane.token = next_token(context, lane.seed)
        lane.remaining -= 1
        lane.active = lane.remaining > 0 and lane.token not in lane.stop_ids
        return TokenOutput(lane.token)
