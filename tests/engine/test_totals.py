"""Several engines' numbers as one's, added up by hand."""

from dataclasses import fields, replace

import pytest

from tests.support.fake_engine import FakeEngine, fake_info
from xlane.engine import EngineStats, LaneStats
from xlane.engine.totals import COUNTERS, LEVELS, MEANS, count_on, restarted, sum_infos, sum_stats

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stats() -> EngineStats:
    """steps 7, prefill_tokens 11, decode_tokens 13, pages 60 of 64 free, step 2 ms, wait 0.25 s."""
    return await FakeEngine().stats()


def lane(number: int) -> LaneStats:
    return LaneStats(
        lane=number, prefill=False, prompt_tokens=1, cached_tokens=0, generated_tokens=1, computed_tokens=1, most_tokens=9,
        pages=1, age_s=0.0,
    )  # fmt: skip


def test_every_statistic_has_its_way_to_be_added():
    known = (*COUNTERS, *LEVELS, *MEANS, "queue_wait_s", "taken_lanes")
    assert sorted(known) == sorted(field.name for field in fields(EngineStats))


async def test_counters_and_levels_add_up_and_times_do_not(stats: EngineStats):
    one = replace(stats, lanes_active=1, queued=3, taken_lanes=(lane(2),))
    two = replace(stats, lanes_active=2, step_ms=6.0, queue_wait_s=0.125, taken_lanes=(lane(0), lane(5)))
    gone = replace(stats, lanes_active=5, decode_tokens=100, step_ms=50.0)
    told = sum_stats([(fake_info(), one), (fake_info(), two)], [gone])
    assert (told.steps, told.prefill_tokens, told.decode_tokens) == (21, 33, 126)
    assert (told.lanes_active, told.queued, told.pages_free, told.pages_total) == (3, 3, 120, 128)
    assert (told.step_ms, told.queue_wait_s) == (4.0, 0.125)
    assert told.decode.device_s.counts[:3] == (6, 15, 0)
    assert told.decode.device_s.sum == 15.0
    assert [taken.lane for taken in told.taken_lanes] == [2, 8, 13]  # of eight lanes each


async def test_counters_go_on_over_a_restart(stats: EngineStats):
    later = replace(stats, steps=1, prefill_tokens=2, decode_tokens=3, queued=9)
    assert restarted(stats, later)
    assert not restarted(stats, replace(stats, decode_tokens=14))
    told = count_on(stats, later)
    assert (told.steps, told.prefill_tokens, told.decode_tokens, told.queued) == (8, 13, 16, 9)


async def test_capacities_add_up(stats: EngineStats):
    first = fake_info()
    told = sum_infos([first, replace(first, lanes=2, device_kind="other", version="0.1", kv_bytes=5)])
    assert (told.lanes, told.pages, told.device_count, told.kv_bytes) == (10, 128, 2, 5)
    assert (told.device_kind, told.version, told.max_total_tokens) == ("fake, other", "0.0, 0.1", 512)
