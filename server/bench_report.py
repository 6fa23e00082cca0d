"""What a load run came to: percentiles of what its users felt, totals, goodput, and a table. Knows no HTTP and no load.

TTFT: sent until the first token. TPOT: mean time per token after the first, of one request. ITL: each single pause between
two pieces of a stream. E2E: sent until complete. Only complete answers count in these; a request that failed is counted
as failed, with what it failed of, and is within no SLO.
"""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from .bench_api import Counts
from .bench_client import Answer
from .options import UsageError

MEASURES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


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
class Slo:
    """What a request must keep to, to count as good. None: no bound."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None
    """Of the longest pause of a stream."""
    e2e_ms: float | None = None

    @classmethod
    def parse(cls, parts: Sequence[str]) -> "Slo":
        """From `ttft_ms=500`, `itl_ms=50`, …. Raises UsageError."""
        bounds: dict[str, float] = {}
        for part in parts:
            name, _, value = part.partition("=")
            try:
                bound = float(value)
            except ValueError:
                bound = 0.0
            if name not in MEASURES or name in bounds or not 0 < bound < float("inf"):
                raise UsageError(
                    f"--slo {part}: expected each of {', '.join(MEASURES)} once at most, as NAME=MILLISECONDS"
                )
            bounds[name] = bound
        return cls(**bounds)

    def kept(self, felt: "Felt") -> bool:
        """Whether one request is within all bounds."""
        worst = (felt.ttft_s, felt.tpot_s or 0.0, max(felt.pauses_s, default=0.0), felt.e2e_s)
        bounds = (self.ttft_ms, self.tpot_ms, self.itl_ms, self.e2e_ms)
        return all(bound is None or 1e3 * value <= bound for value, bound in zip(worst, bounds))


@dataclass(frozen=True, slots=True)
class Felt:
    """One complete answer, as its user felt it."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float | None
    """None of an answer of one token."""
    pauses_s: list[float]
    e2e_s: float

    @classmethod
    def of(cls, answer: Answer, counts_of: Counts) -> "Felt":
        """Counts of tokens are the server's own, else one per event."""
        moments = answer.moments
        try:
            prompt, output = counts_of(json.loads(answer.last_event))
        except (KeyError, TypeError, ValueError):
            prompt, output = 0, len(moments)
        tpot = (moments[-1] - moments[0]) / (output - 1) if output > 1 else None
        pauses = [b - a for a, b in pairwise(moments)]
        return cls(prompt, output, moments[0] - answer.sent_at, tpot, pauses, answer.done_at - answer.sent_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run."""

    concurrency: int | None
    rate: float | None
    requests: int
    failed: int
    errors: dict[str, int]
    """What failed requests failed of -> how many did."""
    first_error: str
    short: int
    """Complete answers of fewer tokens than were asked for."""
    seconds: float
    """From the first request sent to the last answer, failed ones included."""
    prompt_tokens: float
    """Mean, as the server counted."""
    output_tokens: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    within_slo: int | None
    """None if there is no SLO."""
    goodput_requests_per_s: float | None
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    e2e_ms: Spread

    @property
    def load(self) -> str:
        """What was asked of the server."""
        return f"{self.rate:g}/s" if self.concurrency is None else f"{self.concurrency} clients"


def summarise(
    answers: Sequence[Answer],
    counts_of: Counts,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    slo: Slo | None = None,
) -> Result:
    """From answers to numbers."""
    errors = [answer.error or "no token came" for answer in answers if answer.error or not answer.moments]
    good = [answer for answer in answers if not answer.error and answer.moments]
    felt = [Felt.of(answer, counts_of) for answer in good]
    seconds = max(a.done_at for a in answers) - min(a.sent_at for a in answers)
    prompt, output = sum(f.prompt_tokens for f in felt), sum(f.output_tokens for f in felt)
    within = None if slo is None else sum(slo.kept(f) for f in felt)
    per_s = 1 / seconds if seconds else 0.0
    return Result(
        concurrency=concurrency,
        rate=rate,
        requests=len(answers),
        failed=len(errors),
        # `HTTP 503: …` of many requests is one kind of error, whatever each body says.
        errors=dict(Counter(error.partition(":")[0] for error in errors)),
        first_error=errors[0] if errors else "",
        short=sum(f.output_tokens < answer.wanted_tokens for f, answer in zip(felt, good)),
        seconds=round(seconds, 3),
        prompt_tokens=round(prompt / max(1, len(good)), 1),
        output_tokens=round(output / max(1, len(good)), 1),
        output_tokens_per_s=round(output * per_s, 2),
        total_tokens_per_s=round((prompt + output) * per_s, 2),
        requests_per_s=round(len(good) * per_s, 3),
        within_slo=within,
        goodput_requests_per_s=None if within is None else round(within * per_s, 3),
        ttft_ms=Spread.of([f.ttft_s for f in felt]),
        tpot_ms=Spread.of([f.tpot_s for f in felt if f.tpot_s is not None]),
        itl_ms=Spread.of([pause for f in felt for pause in f.pauses_s]),
        e2e_ms=Spread.of([f.e2e_s for f in felt]),
    )


def table(results: Sequence[Result]) -> str:
    """The runs side by side, for people; times in milliseconds."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    measured = [f"{name} {share}" for name in ("TTFT", "TPOT", "ITL", "E2E") for share in ("p50", "p99")]
    goodput = ["in SLO", "goodput"] if any(run.within_slo is not None for run in results) else []
    for name in ("load", "ok", "failed", "req/s", "out tok/s", *measured, *goodput):
        shown.add_column(name, justify="right", no_wrap=True)
    for run in results:
        row = [run.load, str(run.requests - run.failed), str(run.failed), f"{run.requests_per_s:.2f}"]
        spreads = (run.ttft_ms, run.tpot_ms, run.itl_ms, run.e2e_ms)
        row += [f"{run.output_tokens_per_s:.1f}"]
        row += [f"{value:.1f}" for spread in spreads for value in (spread.p50, spread.p99)]
        if goodput:
            row += [f"{run.within_slo}/{run.requests}", f"{run.goodput_requests_per_s:.2f}/s"]
        shown.add_row(*row)
    text = io.StringIO()
    # As wide as it is: a table that is piped or pasted must not be folded to a terminal's width.
    Console(file=text, width=400, color_system=None).print(shown)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def line(load: Mapping[str, object], results: Sequence[Result]) -> str:
    """The same as one line of JSON."""
    return json.dumps({"load": load, "runs": [asdict(result) for result in results]})
