"""What `GET /ui/lanes` answers: the engine's lanes as numbers, and totals from which a reader makes rates."""

import msgspec

from ...engine import LaneStats


class Lane(msgspec.Struct, kw_only=True):
    """A lane that is taken."""

    lane: int
    prefill: bool
    """Whether the sequence's tokens are still being computed; else it decodes."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the cache."""
    generated_tokens: int
    computed_tokens: int
    """Of prompt and output, those whose keys and values are there."""
    most_tokens: int
    """Prompt and output at which it must end."""
    pages: int
    age_s: float
    """Since it was submitted. A smaller one than before means another request."""

    @classmethod
    def of(cls, stats: LaneStats) -> "Lane":
        """The same, as the engine says it."""
        return cls(**{name: getattr(stats, name) for name in cls.__struct_fields__})


class Spread(msgspec.Struct, kw_only=True):
    """How often something was measured since start, and the sum."""

    count: int
    sum_s: float


class Lanes(msgspec.Struct, kw_only=True):
    """What the engine does now."""

    model: str
    device: str
    precision: str
    lanes_total: int
    lanes: list[Lane]
    """Those that are taken, by number."""
    queued: int
    page_tokens: int
    pages_total: int
    pages_free: int
    """Those that no request holds, the remembered ones included."""
    pages_remembered: int
    """Those that a prompt which begins alike can share."""
    max_total_tokens: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    step_ms: float
    ttft: Spread
    """Seconds from submission to the first token."""
    itl: Spread
    """Seconds between tokens of a sequence."""
