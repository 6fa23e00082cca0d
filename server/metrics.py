"""What the front counts, and the text of /metrics. Counting is a few additions; the rest is done when someone scrapes.

TGI's counters have no `_total` suffix, which prometheus-client would add, so its text is corrected afterwards: TGI's
dashboards must work unchanged. TGI's names keep TGI's meaning, but each HTTP request counts once (TGI: chat twice).
Used from one event loop. Knows no HTTP; what the engine counts is engine_metrics.py's.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ..engine import DURATION_EDGES_S, EngineInfo, EngineStats, Timing
from .engine_metrics import buckets, counter, engine_families
from .errors import failure_label
from .keys import Account

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LENGTH_EDGES = tuple(float(2**k) for k in range(21))
"""Tokens, up to a million; TGI's hundred equal steps depend on the model and cost a hundred series."""

FAILURES = ("overloaded", "validation", "template", "incomplete", "dropped", "generation")
"""TGI's labels of failed requests, which are shown before the first failure too."""

_ADDED_SUFFIX = re.compile(r"^(# (?:HELP|TYPE) tgi_\w+?)_total ", re.MULTILINE)


class Histogram:
    """Counts of values per bucket."""

    def __init__(self, name: str, help_text: str, edges: tuple[float, ...] = DURATION_EDGES_S) -> None:
        self.name = name
        self._help = help_text
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it occurred."""
        self._counts[bisect_left(self._edges, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self._counts)

    def family(self) -> HistogramMetricFamily:
        """The histogram as prometheus-client shows it."""
        return HistogramMetricFamily(self.name, self._help, buckets=self.buckets(), sum_value=self.sum)

    def buckets(self) -> list[tuple[str, float]]:
        """Upper edge and count of every bucket."""
        return buckets(self._edges, self._counts)


class ByMethod:
    """Two histograms of one name: of what belongs to a prompt, and of what belongs to later tokens."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name, self._help = name, help_text
        self.prefill, self.decode = Histogram(name, help_text), Histogram(name, help_text)

    def family(self) -> HistogramMetricFamily:
        """Both, told apart by TGI's label."""
        family = HistogramMetricFamily(self._name, self._help, labels=["method"])
        for method, histogram in (("prefill", self.prefill), ("decode", self.decode)):
            family.add_metric([method], histogram.buckets(), histogram.sum)
        return family


@dataclass(frozen=True, slots=True)
class Now:
    """What the front is doing at the moment of a scrape."""

    ready: bool
    in_flight: int
    """Sequences that hold a permit."""
    restarts: int
    """Engines that were started because one died."""
    replays: int
    """Requests that were given to another engine because theirs died."""
    accounts: tuple[Account, ...] = ()
    """What each key used."""
    engines: Mapping[str, int] = field(default_factory=dict)
    """How many of several engines are in which state."""


class Metrics:
    """All numbers of one front."""

    def __init__(self) -> None:
        self._received = 0
        self._succeeded = 0
        self._failed: Counter[str] = Counter(dict.fromkeys(FAILURES, 0))
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
        self.text_duration = ByMethod(
            "tgi_batch_decode_duration", "Tokens to text, per sequence and step, seconds"
        )
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

    def families(self, stats: EngineStats | None, info: EngineInfo | None, now: Now) -> list[Metric]:
        """All there is to tell, with the engine's numbers if it gave any."""
        return [*self._families(), *_now(now), *engine_families(stats, info)]

    def _families(self) -> Iterator[Metric]:
        yield counter("tgi_request_count", "Generation requests received", {(): self._received})
        yield counter("tgi_request_success", "Generation requests finished", {(): self._succeeded})
        failures = {(("err", label),): count for label, count in self._failed.items()}
        yield counter("tgi_request_failure", "Generation requests failed, by reason", failures)
        yield counter(
            "xlane_cached_prompt_tokens_total", "Prompt tokens found in the cache", {(): self.cached_tokens}
        )
        for value in vars(self).values():
            if isinstance(value, Histogram | ByMethod):
                yield value.family()


def certificate_family(left_s: float) -> Metric:
    """The certificate's time that is left, which is of no model."""
    return GaugeMetricFamily("xlane_tls_certificate_seconds", "Until the certificate expires", left_s)


def text_of(families: list[Metric]) -> bytes:
    """The Prometheus text."""
    registry = CollectorRegistry()
    registry.register(_Collector(families))
    return _ADDED_SUFFIX.sub(r"\1 ", generate_latest(registry).decode()).encode()


def by_model(families: Mapping[str, Iterable[Metric]]) -> list[Metric]:
    """The families of several models as one each, whose samples tell the model. What keys used is not of a model, and the
    first tells of it."""
    found: dict[str, Metric] = {}
    for model, told in families.items():
        for family in told:
            keyed = family.name.startswith("xlane_key_")
            if keyed and family.name in found:
                continue
            one = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            one.samples += [
                sample if keyed else sample._replace(labels={"model": model, **sample.labels})
                for sample in family.samples
            ]
    return list(found.values())


def _now(now: Now) -> Iterator[Metric]:
    yield GaugeMetricFamily("xlane_ready", "Whether generations are served", float(now.ready))
    yield GaugeMetricFamily("xlane_requests_in_flight", "Sequences waiting or running", now.in_flight)
    yield counter("xlane_engine_restarts_total", "Engines started after one died", {(): now.restarts})
    yield counter(
        "xlane_replays_total", "Requests given to another engine after theirs died", {(): now.replays}
    )
    if now.engines:
        engines = GaugeMetricFamily("xlane_engines", "Engines elsewhere, by state", labels=["state"])
        for state, count in now.engines.items():
            engines.add_metric([state], count)
        yield engines
    if now.accounts:
        yield from _by_key(now.accounts)


def _by_key(accounts: Sequence[Account]) -> Iterator[Metric]:
    """What each key used. The label is its name: there are as many as the file has lines."""
    named = {account.key.name: account for account in accounts}
    requests = {(("key", name),): account.requests for name, account in named.items()}
    yield counter("xlane_key_requests_total", "Requests taken, by key", requests)
    tokens = {
        (("key", name), ("kind", kind)): count
        for name, account in named.items()
        for kind, count in (("prompt", account.prompt_tokens), ("generated", account.generated_tokens))
    }
    yield counter("xlane_key_tokens_total", "Tokens computed, by key", tokens)
    refused = {
        (("key", name), ("limit", limit)): count
        for name, account in named.items()
        for limit, count in account.refused.items()
    }
    yield counter("xlane_key_refused_total", "Requests beyond a limit of their key", refused)
    running = GaugeMetricFamily("xlane_key_running", "Requests running, by key", labels=["key"])
    for name, account in named.items():
        running.add_metric([name], account.running)
    yield running


class _Collector(Collector):
    """Hands families made beforehand to a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
