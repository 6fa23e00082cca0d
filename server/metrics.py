"""What the front counts, and the text of /metrics. Counting is a few additions; the rest is done when someone scrapes.

TGI's counters have no `_total` suffix, which prometheus-client would add, so its text is corrected afterwards: TGI's
dashboards must work unchanged. TGI's names keep TGI's meaning, but each HTTP request counts once (TGI: chat twice).
Used from one event loop. Knows no HTTP.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ..engine import EngineInfo, EngineStats, Timing
from .errors import failure_label

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DURATION_EDGES = tuple(1.5e-4 * 1.5**k for k in range(35))
"""TGI's, 0.15 ms to 146 s."""
LENGTH_EDGES = tuple(float(2**k) for k in range(21))
"""Tokens, up to a million; TGI's hundred equal steps depend on the model and cost a hundred series."""

_ADDED_SUFFIX = re.compile(r"^(# (?:HELP|TYPE) tgi_\w+?)_total ", re.MULTILINE)


class Histogram:
    """Counts of values per bucket."""

    def __init__(self, name: str, help_text: str, edges: tuple[float, ...] = DURATION_EDGES) -> None:
        self.name = name
        self._help = help_text
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it occurred."""
        self._counts[bisect_left(self._edges, value)] += times
        self._sum += value * times

    def family(self) -> HistogramMetricFamily:
        """The histogram as prometheus-client shows it: every bucket holds all smaller ones too."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for edge, count in zip((*map(str, self._edges), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((edge, float(total)))
        return HistogramMetricFamily(self.name, self._help, buckets=buckets, sum_value=self._sum)


class Metrics:
    """All numbers of one front."""

    def __init__(self) -> None:
        self._received = 0
        self._succeeded = 0
        self._failed: Counter[str] = Counter()
        self.cached_tokens = 0
        self.request_duration = Histogram("tgi_request_duration", "Whole request, seconds")
        self.validation_duration = Histogram("tgi_request_validation_duration", "Arrival to engine, seconds")
        self.queue_duration = Histogram("tgi_request_queue_duration", "Waiting for a lane, seconds")
        self.inference_duration = Histogram("tgi_request_inference_duration", "In a lane, seconds")
        self.mean_token_duration = Histogram(
            "tgi_request_mean_time_per_token_duration", "Time in a lane per generated token, seconds"
        )
        self.input_length = Histogram("tgi_request_input_length", "Prompt tokens", LENGTH_EDGES)
        self.max_new_tokens = Histogram("tgi_request_max_new_tokens", "Tokens allowed", LENGTH_EDGES)
        self.generated_tokens = Histogram("tgi_request_generated_tokens", "Generated tokens", LENGTH_EDGES)
        self.first_token = Histogram("xlane_ttft_seconds", "Submission to first token")
        self.inter_token = Histogram("xlane_inter_token_seconds", "Between tokens of a sequence")

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one generation request by how the block ends."""
        self._received += 1
        start = perf_counter()
        try:
            yield
        except BaseException as error:
            self._failed[failure_label(error)] += 1
            raise
        self._succeeded += 1
        self.request_duration.observe(perf_counter() - start)

    def finished(self, tokens: int, timing: Timing | None) -> None:
        """A sequence came to its end."""
        self.generated_tokens.observe(tokens)
        if timing is None:
            return
        inference = max(0.0, timing.total_s - timing.queue_s)
        self.queue_duration.observe(timing.queue_s)
        self.inference_duration.observe(inference)
        self.mean_token_duration.observe(inference / max(1, tokens))

    def text(self, stats: EngineStats | None, info: EngineInfo | None) -> bytes:
        """The Prometheus text, with the engine's numbers if it gave any."""
        registry = CollectorRegistry()
        registry.register(_Collector([*self._families(), *_engine_families(stats, info)]))
        return _ADDED_SUFFIX.sub(r"\1 ", generate_latest(registry).decode()).encode()

    def _families(self) -> Iterator[Metric]:
        yield _counter("tgi_request_count", "Generation requests received", {(): self._received})
        yield _counter("tgi_request_success", "Generation requests finished", {(): self._succeeded})
        failures = {(("err", label),): count for label, count in self._failed.items()}
        yield _counter("tgi_request_failure", "Generation requests failed, by reason", failures)
        yield _counter(
            "xlane_cached_prompt_tokens_total", "Prompt tokens found in the cache", {(): self.cached_tokens}
        )
        for value in vars(self).values():
            if isinstance(value, Histogram):
                yield value.family()


class _Collector(Collector):
    """Hands families made beforehand to a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _counter(name: str, help_text: str, values: dict[tuple[tuple[str, str], ...], int]) -> Metric:
    """A counter whose samples are named exactly so."""
    family = Metric(name.removesuffix("_total") if name.startswith("xlane_") else name, help_text, "counter")
    for labels, value in values.items():
        family.add_sample(name, dict(labels), float(value))
    return family


def _engine_families(stats: EngineStats | None, info: EngineInfo | None) -> Iterator[Metric]:
    if info is not None:
        capacity = info.pages * info.page_tokens
        yield GaugeMetricFamily("tgi_batch_max_total_tokens", "Capacity of the KV pool, tokens", capacity)
    if stats is None:
        return
    page_tokens = info.page_tokens if info is not None else 0
    held = (stats.pages_total - stats.pages_free) * page_tokens
    gauges: dict[str, tuple[str, float]] = {
        "tgi_queue_size": ("Requests waiting for a lane", stats.queued),
        "tgi_batch_current_size": ("Sequences in a lane", stats.lanes_active),
        "tgi_batch_current_max_tokens": ("Tokens of KV pages in use", held),
        "xlane_lanes_active": ("Sequences in a lane", stats.lanes_active),
        "xlane_pages_free": ("Free KV pages", stats.pages_free),
        "xlane_pages_total": ("All KV pages", stats.pages_total),
        "xlane_step_seconds": ("Median device time of the last decode steps", stats.step_ms / 1e3),
        "xlane_gap_seconds": ("Median host time between launches", stats.gap_ms / 1e3),
    }
    for name, (help_text, value) in gauges.items():
        yield GaugeMetricFamily(name, help_text, value)
    decode = {(("method", "decode"),): stats.steps}
    yield _counter("tgi_batch_inference_count", "Decode launches", decode)
    counters = {
        "xlane_prefill_tokens_total": ("Prompt tokens computed", stats.prefill_tokens),
        "xlane_decode_tokens_total": ("Tokens generated", stats.decode_tokens),
        "xlane_preemptions_total": ("Sequences put back for want of pages", stats.preemptions),
        "xlane_compiles_after_ready_total": ("Compilations after readiness", stats.compiles_after_ready),
    }
    for name, (help_text, value) in counters.items():
        yield _counter(name, help_text, {(): value})
