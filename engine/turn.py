"""What the scheduler decided for one turn, as the runner takes it. Host values only."""

from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import RequestFailed
from .request import SamplingParams, TokenOutput
from .sequence import Sequence

NO_PAGE = -1
"""In a decode row: the lane needs no new page."""

SEGMENT_TOKENS = 4
"""Prompt tokens that a launch has for each request that may share them. A request more is a row of logits more, whether it is
there or not: beside 4 tokens seven that are not would take a tenth of a step."""


def sharing(tokens: int, most: int, each: int = SEGMENT_TOKENS) -> int:
    """Requests, at most `most`, that may share so many prompt tokens, of which `each` are for one."""
    return max(1, min(most, tokens // each))


Result = tuple[TokenOutput, ...] | RequestFailed | None
"""What a launch made of a sequence: its new tokens in order, an error, or None if its lane had ended before."""


class Size(NamedTuple):
    """What a program is compiled for."""

    rows: int
    """Lanes that decode."""
    tokens: int
    """Prompt tokens."""

    @property
    def name(self) -> str:
        """For people and manifests."""
        if not self.tokens:
            return f"decode[{self.rows}]"
        return f"mixed[{self.rows}+{self.tokens}]" if self.rows else f"prefill[{self.tokens}]"

    def holds(self, rows: int, tokens: int) -> bool:
        """Whether so much work fits. Prompts may leave all rows free; what only decodes takes no program for prompts."""
        return rows <= self.rows and tokens <= self.tokens and (self.tokens > 0) == (tokens > 0)

    def segments(self, most: int) -> int:
        """Requests, at most `most`, that may share its prompt tokens."""
        return sharing(self.tokens, most) if self.tokens else 0


class Segment(NamedTuple):
    """A piece of one lane's prompt in a launch."""

    lane: int
    tokens: list[int]
    start: int
    """Position of the first of them."""
    last: bool
    """The prompt ends here: sample a token and switch the lane on."""
    prompt_tokens: int
    """Length of the original prompt; later tokens are replayed output and count for penalties as such."""
    remaining: int
    """Tokens that may be generated from here on."""
    pages: list[int]
    sampling: SamplingParams
    targets: tuple[int, ...] = ()
    """The token that follows each, where its log-probability is asked for; else -1. Empty if none is."""
    prompt_top: int = 0
    """Alternatives to report with each target."""
    recorded: int = 0
    """Tokens before this position were counted for penalties by an earlier launch."""
    adapter: int = 0
    """Its number from 1 up, 0 for none."""


class Row(NamedTuple):
    """One row of a decode launch: a lane's newest token, or a guess at one that may come after it."""

    lane: int
    page_index: int
    page: int
    """See `batch.DecodePlan`."""
    ahead: int = 0
    """0 for the newest token, n for the n-th guess. A lane's rows are adjacent and in this order."""
    guess: int = 0
    """The guessed token; any where `ahead` is 0."""


@dataclass(slots=True)
class Turn:
    """What to launch next. A lane whose prompt ends in it decodes from the next turn on."""

    segments: list[Segment] = field(default_factory=list)
    prefilled: list[Sequence] = field(default_factory=list)
    """The sequence of each segment."""
    rows: list[Row] = field(default_factory=list)
    decoded: list[Sequence] = field(default_factory=list)
    """The sequence of each row."""

    @property
    def prompt_tokens(self) -> int:
        """Of all segments."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def behind(self) -> int:
        """The farthest position at which a segment begins: so many tokens its own read."""
        return max((segment.start for segment in self.segments), default=0)

    @property
    def asks(self) -> tuple[int, int]:
        """Rows and prompt tokens of a size that holds it, with as many segments as it has."""
        shared = SEGMENT_TOKENS * len(self.segments) if len(self.segments) > 1 else 0
        return len(self.rows), max(self.prompt_tokens, shared)
