"""What several engines say of themselves, as if they were one: sums, and where those mean nothing, means and least ones.

Counters never fall: what an engine had counted before it ended stays in. Knows the fields of stats and infos; no engine.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

from .request import EngineInfo, EngineStats, LaneStats

T = TypeVar("T")
COUNTERS = (
    "steps", "prefill_tokens", "decode_tokens", "preemptions", "compiles_after_ready", "prefill", "decode",
    "prefill_rows", "joins", "guessed_tokens", "accepted",
)  # fmt: skip
"""Of stats, what counts since start."""
LEVELS = ("lanes_active", "queued", "pages_free", "pages_remembered", "pages_total")
"""What is so much now, and adds up."""
MEANS = ("step_ms", "host_ms", "gap_ms")
CAPACITIES = (
    "device_count", "lanes", "pages", "max_queued", "memory_bytes", "weights_bytes", "kv_bytes", "temp_bytes",
)  # fmt: skip
"""Of infos, what adds up."""


def count_on(before: EngineStats, later: EngineStats) -> EngineStats:
    """The later one, whose counters go on from those before."""
    return replace(later, **{name: _plus(getattr(before, name), getattr(later, name)) for name in COUNTERS})


def restarted(before: EngineStats, later: EngineStats) -> bool:
    """Whether the engine that said the later one has not counted what the one before had."""
    return any(getattr(later, name) < getattr(before, name) for name in ("steps", "prefill_tokens"))


def sum_stats(
    engines: Sequence[tuple[EngineInfo, EngineStats]], past: Sequence[EngineStats] = ()
) -> EngineStats:
    """Of at least one engine that works now; of those in the `past` the counters only. Lanes are numbered through."""
    infos, stats = [info for info, _ in engines], [each for _, each in engines]
    summed = stats[0]
    for each in (*stats[1:], *past):
        summed = count_on(each, summed)
    return replace(
        summed,
        **{name: sum(getattr(each, name) for each in stats) for name in LEVELS},
        **{name: fmean(getattr(each, name) for each in stats) for name in MEANS},
        # A request that came now would go where it waits least.
        queue_wait_s=min(each.queue_wait_s for each in stats),
        taken_lanes=_numbered_through([info.lanes for info in infos], [each.taken_lanes for each in stats]),
    )


def sum_infos(infos: Sequence[EngineInfo]) -> EngineInfo:
    """Of at least one engine, all of which serve the same."""
    first = infos[0]
    return replace(
        first,
        **{name: sum(getattr(info, name) for info in infos) for name in CAPACITIES},
        device_kind=_each_once(info.device_kind for info in infos),
        version=_each_once(info.version for info in infos),
        warning=_each_once(info.warning for info in infos),
    )


def _numbered_through(counts: Sequence[int], taken: Sequence[tuple[LaneStats, ...]]) -> tuple[LaneStats, ...]:
    found: list[LaneStats] = []
    first = 0
    for count, lanes in zip(counts, taken, strict=True):
        found += [replace(lane, lane=first + lane.lane) for lane in lanes]
        first += count
    return tuple(found)


def _each_once(texts: Any) -> str:
    return ", ".join(dict.fromkeys(text for text in texts if text))


def _plus(one: T, other: T) -> T:
    """The sum, field by field, of numbers and of what is made of them."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(_plus(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[return-value]
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return type(one)(*(_plus(getattr(one, name), getattr(other, name)) for name in names))  # type: ignore[return-value]
    return one + other  # type: ignore[operator]
