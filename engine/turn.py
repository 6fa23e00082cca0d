"""What the scheduler decided for one turn, as the runner takes it. Host values only."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .request import SamplingParams
from .sequence import Sequence

ProgramKind = Literal["prefill", "decode"]

NO_PAGE = -1
"""In a decode row: the lane needs no new page."""


class Segment(NamedTuple):
    """One lane's part of a prefill launch."""

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


@dataclass(slots=True)
class Turn:
    """What to launch next. Prefill goes first, so lanes it switches on may decode in the same turn."""

    segments: list[Segment] = field(default_factory=list)
    prefilled: list[Sequence] = field(default_factory=list)
    """The sequence of each segment."""
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    """(lane, page index, page) of each decoding lane, see `batch.DecodePlan`."""
    decoded: list[Sequence] = field(default_factory=list)
    """The sequence of each row."""
