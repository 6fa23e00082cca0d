"""What an engine says of itself → Prometheus families, under TGI's names where TGI has one for the same thing.

TGI counts batches; here every launch of a compiled program is one. Knows no HTTP and no text format.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import ceil

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily

from ..engine import DURATION_EDGES_S, ROWS_EDGES, EngineInfo, EngineStats, Histogram, LaunchStats

Labels = tuple[tuple[str, str], ...]

WITHOUT_MEANING = {
    "tgi_batch_concat_duration": "a sequence joins by taking a lane; no batches are put together"
}
"""TGI's metrics that are absent rather than made up, and why."""
SKIPPED_QUANTILES = ("0", "0.5", "0.9", "0.95", "0.99", "0.999", "1")


def counter(name: str, help_text: str, values: Mapping[Labels, int]) -> Metric:
    """A counter whose samples are named exactly so."""
    family = Metric(name.removesuffix("_total") if name.startswith("xlane_") else name, help_text, "counter")
    for labels, value in values.items():
        family.add_sample(name, dict(labels), float(value))
    return family


def histogram(
    name: str, help_text: str, edges: tuple[float, ...], values: Mapping[Labels, Histogram]
) -> HistogramMetricFamily:
    """A histogram of what the engine counted between these edges."""
    names = [label for label, _ in next(iter(values))]
    family = HistogramMetricFamily(name, help_text, labels=names)
    for labels, counted in values.items():
        family.add_metric([value for _, value in labels], buckets(edges, counted.counts), counted.sum)
    return family


def buckets(edges: tuple[float, ...], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Upper edge and count of every bucket, which in Prometheus holds all smaller ones too."""
    uppers = (*map(str, edges), "+Inf")
    return [(edge, float(total)) for edge, total in zip(uppers, accumulate(counts), strict=True)]


def engine_families(stats: EngineStats | None, info: EngineInfo | None) -> Iterator[Metric]:
    """All families; without an engine none, without its numbers only what never changes."""
    if info is not None:
        yield from _constants(info)
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
        "xlane_pages_remembered": ("KV pages that prompts which begin alike share", stats.pages_remembered),
        "xlane_pages_total": ("All KV pages", stats.pages_total),
        "xlane_queue_wait_seconds": (
            "How long a request that came now would wait for a lane",
            stats.queue_wait_s,
        ),
        "xlane_step_seconds": ("Median device time of the last decode steps", stats.step_ms / 1e3),
        "xlane_host_seconds": ("Median work of the host a turn, beside the device", stats.host_ms / 1e3),
        "xlane_gap_seconds": ("Mean wait of the device for its next launch", stats.gap_ms / 1e3),
    }
    for name, (help_text, value) in gauges.items():
        yield GaugeMetricFamily(name, help_text, value)
    yield from _launches(stats)
    yield histogram(
        "tgi_batch_next_size", "Sequences in a prefill launch", ROWS_EDGES, {(): stats.prefill_rows}
    )
    yield _skipped(stats.accepted)
    joins = {(("reason", "chunking"),): stats.joins}
    yield counter("tgi_batch_concat", "Times that sequences began beside running ones", joins)
    counters = {
        "xlane_prefill_tokens_total": ("Prompt tokens computed", stats.prefill_tokens),
        "xlane_decode_tokens_total": ("Tokens generated", stats.decode_tokens),
        "xlane_guessed_tokens_total": ("Tokens guessed and verified", stats.guessed_tokens),
        "xlane_accepted_tokens_total": ("Guessed tokens that were right", round(stats.accepted.sum)),
        "xlane_preemptions_total": ("Sequences put back for want of pages", stats.preemptions),
        "xlane_compiles_after_ready_total": ("Compilations after readiness", stats.compiles_after_ready),
    }
    for name, (help_text, value) in counters.items():
        yield counter(name, help_text, {(): value})


def _skipped(accepted: Histogram) -> Metric:
    """TGI's summary of tokens that a sequence got beyond one per step."""
    name, totals = "tgi_request_skipped_tokens", [*accumulate(accepted.counts)]
    family = SummaryMetricFamily(name, "Tokens beyond one per step, by speculation")
    for quantile in SKIPPED_QUANTILES:
        # The smallest number that this part of all steps did not exceed.
        value = bisect_left(totals, max(1, ceil(float(quantile) * totals[-1]))) if totals[-1] else 0
        family.add_sample(name, {"quantile": quantile}, float(value))
    family.add_metric([], totals[-1], accepted.sum)
    return family


def _constants(info: EngineInfo) -> Iterator[Metric]:
    capacity = info.pages * info.page_tokens
    yield GaugeMetricFamily("tgi_batch_max_total_tokens", "Capacity of the KV pool, tokens", capacity)
    yield GaugeMetricFamily("xlane_lanes_total", "Sequences that can decode at once", info.lanes)
    served = GaugeMetricFamily(
        "xlane_info", "What is served", labels=["model_id", "version", "platform", "dtype"]
    )
    served.add_metric([info.model_id, info.version, info.platform, info.dtype], 1.0)
    yield served


def _launches(stats: EngineStats) -> Iterator[Metric]:
    """Launches are counted when their results are there, and one that fails ends its engine: a living one has none."""
    methods: dict[Labels, LaunchStats] = {
        (("method", "prefill"),): stats.prefill,
        (("method", "decode"),): stats.decode,
    }
    counts = {labels: sum(launches.whole_s.counts) for labels, launches in methods.items()}
    yield counter("tgi_batch_inference_count", "Launches read back", counts)
    yield counter("tgi_batch_inference_success", "Launches read back", counts)
    failed = dict.fromkeys(counts, 0)
    yield counter("tgi_batch_inference_failure", "Failed launches; see xlane_engine_restarts_total", failed)
    whole = {labels: launches.whole_s for labels, launches in methods.items()}
    device = {labels: launches.device_s for labels, launches in methods.items()}
    emit = {labels: launches.emit_s for labels, launches in methods.items()}
    for name, help_text, durations in (
        ("tgi_batch_inference_duration", "A launch until its outputs are delivered, seconds", whole),
        ("tgi_batch_forward_duration", "A launch until it is read back, seconds", device),
        ("tgi_batch_filter_duration", "Delivering the outputs of a launch, seconds", emit),
    ):
        yield histogram(name, help_text, DURATION_EDGES_S, durations)
