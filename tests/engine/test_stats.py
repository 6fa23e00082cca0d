"""What the engine counts about its launches, with times by hand."""

import pytest

from xlane.engine.request import DURATION_EDGES_S
from xlane.engine.stats import Counters, Tally


def test_a_value_counts_up_to_the_edge_it_equals():
    tally = Tally((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 7.0):
        tally.observe(value)
    assert (tally.snapshot().counts, tally.snapshot().sum) == ((2, 2, 1), 12.0)


def test_the_edges_of_durations_are_tgis():
    assert len(DURATION_EDGES_S) == 35
    assert DURATION_EDGES_S[:3] == (0.00015, pytest.approx(0.000225), pytest.approx(0.0003375))
    assert DURATION_EDGES_S[-1] == pytest.approx(145.6, rel=1e-3)


def test_the_wait_follows_from_how_long_the_last_ones_were_served():
    counters = Counters()
    assert counters.queue_wait_s(waiting=9, running=3) == 0.0
    for seconds in (1.0, 3.0):
        counters.served(seconds)
    # Three lanes, each given on every two seconds: the ninth in line has its lane after three rounds.
    assert counters.queue_wait_s(waiting=9, running=3) == 6.0
    assert counters.queue_wait_s(waiting=0, running=3) == 0.0
    assert counters.queue_wait_s(waiting=1, running=0) == 2.0


def test_a_gap_is_what_the_device_waits_for_the_host_and_not_for_requests():
    counters = Counters()
    assert counters.gap_ms == 0.0
    counters.launched(counters.decode, launched_s=10.0, read_s=11.0, told_s=11.0)
    counters.launched(counters.decode, launched_s=10.5, read_s=12.0, told_s=12.0)  # in time
    counters.launched(counters.decode, launched_s=12.25, read_s=13.0, told_s=13.0)
    assert counters.gap_ms == pytest.approx(1e3 * (0.0 + 0.25) / 2)
    counters.rest()
    counters.launched(counters.decode, launched_s=99.0, read_s=100.0, told_s=100.0)
    assert counters.gap_ms == pytest.approx(1e3 * 0.25 / 2)


def test_a_launch_counts_from_when_the_one_before_was_done():
    counters = Counters()
    counters.launched(counters.prefill, launched_s=10.0, read_s=14.0, told_s=15.0)
    # Launched while the first was under way: the device took it up at 14, the host at 15.
    counters.launched(counters.decode, launched_s=11.0, read_s=16.0, told_s=16.5)
    # Launched when nothing ran.
    counters.launched(counters.decode, launched_s=20.0, read_s=21.0, told_s=21.25)
    prefill, decode = counters.prefill.snapshot(), counters.decode.snapshot()
    assert (prefill.device_s.sum, prefill.emit_s.sum, prefill.whole_s.sum) == (4.0, 1.0, 5.0)
    assert (decode.device_s.sum, decode.emit_s.sum, decode.whole_s.sum) == (2.0 + 1.0, 0.5 + 0.25, 1.5 + 1.25)
    assert sum(decode.whole_s.counts) == 2
