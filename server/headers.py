"""TGI's response headers: what a request cost, for clients and proxies that bill or log by them."""

from time import perf_counter

from ..engine import Timing
from .backend import Serving


class Clock:
    """When one HTTP request reached its stages."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._submitted = self._start

    def submitted(self) -> float:
        """Note that validation is over; seconds it took."""
        self._submitted = perf_counter()
        return self.validation_s

    @property
    def validation_s(self) -> float:
        """Seconds from arrival to submission."""
        return self._submitted - self._start

    @property
    def total_s(self) -> float:
        """Seconds since arrival."""
        return perf_counter() - self._start


def stream_headers(serving: Serving, characters: int) -> dict[str, str]:
    """What is known before the first token. `characters`: of the prompt."""
    kind = serving.info.device_kind.replace(" ", "-")
    return {
        "x-compute-type": f"{serving.info.device_count}-{kind}",
        "x-compute-characters": str(characters),
    }


def full_headers(
    serving: Serving,
    characters: int,
    clock: Clock,
    timings: list[Timing | None],
    prompt_tokens: int,
    generated: int,
) -> dict[str, str]:
    """All of TGI's, for an answer given at once. Times of several sequences are those of the longest."""
    known = [timing for timing in timings if timing is not None]
    queue = max((timing.queue_s for timing in known), default=0.0)
    inference = max((timing.total_s - timing.queue_s for timing in known), default=0.0)
    total = clock.total_s
    return {
        **stream_headers(serving, characters),
        "x-compute-time": f"{total:.6f}",
        "x-total-time": _ms(total),
        "x-validation-time": _ms(clock.validation_s),
        "x-queue-time": _ms(queue),
        "x-inference-time": _ms(inference),
        "x-time-per-token": _ms(inference / max(1, generated)),
        "x-prompt-tokens": str(prompt_tokens),
        "x-generated-tokens": str(generated),
    }


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))
