"""What a load run came to: percentiles of what its users felt, totals, and a table. Knows no HTTP and no load.

TTFT: sent until the first token. TPOT: mean time per token after the first, of one request. ITL: each single pause between
two pieces of a stream. E2E: sent until complete.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bench_client import Answer

Counts = Callable[[Mapping[str, Any]], tuple[int, int]]
"""Last event of a stream -> (prompt tokens, output tokens)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A measure over all requests of a run, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """From samples; of nothing, all zero."""
        ordered = sorted(seconds) or [0.0]

        def at(share: float) -> float:
            place = share * (len(ordered) - 1)
            low = int(place)
            high = min(low + 1, len(ordered) - 1)
            return round(1e3 * (ordered[low] + (ordered[high] - ordered[low]) * (place - low)), 3)

        return cls(round(1e3 * sum(ordered) / len(ordered), 3), at(0.5), at(0.9), at(0.99))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run."""

    concurrency: int | None
    rate: float | None
    requests: int
    failed: int
    seconds: float
    prompt_tokens: float
    """Mean, as the server counted."""
    output_tokens: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    e2e_ms: Spread
    first_error: str


def summarise(
    answers: Sequence[Answer], counts_of: Counts, concurrency: int | None, rate: float | None
) -> Result:
    """From answers to numbers. Counts of tokens are the server's own, else one per event."""
    good = [answer for answer in answers if not answer.error and answer.moments]
    errors = [answer.error or "no token came" for answer in answers if answer.error or not answer.moments]
    counts = [_counts(answer, counts_of) for answer in good]
    seconds = max(a.done_at for a in good) - min(a.sent_at for a in answers) if good else 0.0
    prompt, output = sum(c[0] for c in counts), sum(c[1] for c in counts)
    tails = [(a.moments[-1] - a.moments[0]) / (c[1] - 1) for a, c in zip(good, counts) if c[1] > 1]
    per_s = 1 / seconds if seconds else 0.0
    return Result(
        concurrency=concurrency,
        rate=rate,
        requests=len(answers),
        failed=len(errors),
        seconds=round(seconds, 3),
        prompt_tokens=round(prompt / max(1, len(good)), 1),
        output_tokens=round(output / max(1, len(good)), 1),
        output_tokens_per_s=round(output * per_s, 2),
        total_tokens_per_s=round((prompt + output) * per_s, 2),
        requests_per_s=round(len(good) * per_s, 3),
        ttft_ms=Spread.of([a.moments[0] - a.sent_at for a in good]),
        tpot_ms=Spread.of(tails),
        itl_ms=Spread.of([b - a for answer in good for a, b in zip(answer.moments, answer.moments[1:])]),
        e2e_ms=Spread.of([a.done_at - a.sent_at for a in good]),
        first_error=errors[0] if errors else "",
    )


def _counts(answer: Answer, counts_of: Counts) -> tuple[int, int]:
    try:
        return counts_of(json.loads(answer.last_event))
    except (KeyError, TypeError, ValueError):
        return 0, len(answer.moments)


def table(results: Sequence[Result]) -> str:
    """The runs side by side, for people."""
    head = (
        "load",
        "ok",
        "out tok/s",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "ITL p50",
        "p99",
        "E2E p50",
        "p99",
    )
    rows: list[tuple[str, ...]] = [head]
    for run in results:
        spreads = (run.ttft_ms, run.tpot_ms, run.itl_ms, run.e2e_ms)
        load = f"{run.rate:g}/s" if run.concurrency is None else f"{run.concurrency} clients"
        times = [f"{value:.1f}" for spread in spreads for value in (spread.p50, spread.p99)]
        rows.append(
            (load, f"{run.requests - run.failed}/{run.requests}", f"{run.output_tokens_per_s:.1f}", *times)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
