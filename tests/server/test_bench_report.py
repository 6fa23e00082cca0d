"""The load report's numbers, by hand and by NumPy, and its plots."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlane.server.bench_api import APIS
from xlane.server.bench_client import Answer
from xlane.server.bench_plot import Panel, check_plot, draw, panels_of
from xlane.server.bench_report import Result, Slo, Spread, summarise, table
from xlane.server.options import UsageError

COUNTS = APIS["openai"].counts


def usage(tokens: int) -> bytes:
    return json.dumps({"usage": {"prompt_tokens": 7, "completion_tokens": tokens}}).encode()


ANSWERS = [
    Answer(
        sent_at=0.0, done_at=4.0, status=200, moments=[1.0, 2.0, 4.0], last_event=usage(3), wanted_tokens=3
    ),
    # Two tokens in one event count as two.
    Answer(sent_at=1.0, done_at=5.0, status=200, moments=[3.0, 5.0], last_event=usage(3), wanted_tokens=4),
]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60))
def test_percentiles_are_numpys(seconds: list[float]):
    spread = Spread.of(seconds)
    expected = [1e3 * np.mean(seconds), *(1e3 * np.percentile(seconds, share) for share in (50, 90, 99))]
    assert [spread.mean, spread.p50, spread.p90, spread.p99] == pytest.approx(expected, abs=0.0006, rel=1e-9)


def test_percentiles_by_hand():
    assert Spread.of([0.003, 0.001, 0.002]) == Spread(2.0, 2.0, 2.8, 2.98)
    assert Spread.of([]) == Spread(0, 0, 0, 0)


def test_numbers_by_hand():
    result = summarise(ANSWERS, COUNTS, concurrency=2)
    assert (result.seconds, result.output_tokens_per_s, result.total_tokens_per_s) == (5.0, 1.2, 4.0)
    assert result.ttft_ms.mean == 1500
    assert result.tpot_ms.mean == pytest.approx(1e3 * (1.5 + 1.0) / 2)
    assert result.itl_ms.mean == pytest.approx(1e3 * 5 / 3, abs=0.001)
    assert result.e2e_ms.p50 == 4000
    assert (result.short, result.within_slo, result.goodput_requests_per_s) == (1, None, None)


def test_failures_count_and_their_time_too():
    failed = [
        Answer(sent_at=1.0, done_at=10.0, error=f"HTTP 503: busy {number}", moments=[2.0])
        for number in range(2)
    ]
    empty = Answer(sent_at=1.0, done_at=2.0, status=200)
    result = summarise([*ANSWERS, *failed, empty], COUNTS, rate=1.5, slo=Slo(e2e_ms=1e6))
    assert (result.requests, result.failed) == (5, 3)
    assert result.errors == {"HTTP 503": 2, "no token came": 1}
    assert result.first_error == "HTTP 503: busy 0"
    assert (result.seconds, result.output_tokens_per_s, result.within_slo) == (10.0, 0.6, 2)
    assert result.ttft_ms.mean == 1500, "of complete answers only"


@pytest.mark.parametrize(
    ("bounds", "within"),
    [
        (["ttft_ms=1000"], 1),
        (["ttft_ms=2000"], 2),
        (["tpot_ms=1000"], 1),
        (["itl_ms=1999"], 0),
        (["itl_ms=2000"], 2),
        (["e2e_ms=4000"], 2),
        (["e2e_ms=4000", "ttft_ms=1500"], 1),
    ],
)
def test_goodput_by_hand(bounds: list[str], within: int):
    result = summarise(ANSWERS, COUNTS, concurrency=2, slo=Slo.parse(bounds))
    assert (result.within_slo, result.goodput_requests_per_s) == (within, within / 5)


def both(**options: Any) -> list[Result]:
    return [summarise(ANSWERS, COUNTS, concurrency=clients, **options) for clients in (2, 16)]


WITH_SLO = {"slo": Slo(ttft_ms=1000)}


def test_the_table_is_aligned_and_not_folded():
    head, rule, *rows = table(both(**WITH_SLO)).splitlines()
    assert [row.split()[:2] for row in rows] == [["2", "clients"], ["16", "clients"]]
    assert head.split()[-3:] == ["in", "SLO", "goodput"]
    assert set(rule.strip()) == {"─"}
    assert "1/2" in rows[0]
    assert "goodput" not in table(both())


def test_panels_hold_what_was_measured():
    tokens, requests, ttft, itl, tpot, e2e = panels_of(both(**WITH_SLO))
    assert list(tokens.curves.values()) == [[1.2, 1.2]]
    assert requests.curves == {"all complete answers": [0.4, 0.4], "within the SLO": [0.2, 0.2]}
    assert [list(panel.curves) for panel in (ttft, itl, tpot, e2e)] == [["p50", "p90", "p99"]] * 4
    assert (ttft.curves["p50"], e2e.curves["p50"], tpot.curves["p50"]) == (
        [1500, 1500],
        [4000, 4000],
        [1250, 1250],
    )


def test_the_same_numbers_make_the_same_svg(tmp_path: Path):
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        draw(str(path), "tiny", "clients", ["2", "16"], panels_of(both()))
    one, two = (path.read_text() for path in paths)
    assert one == two
    assert one.startswith("<?xml")


def test_a_load_that_was_not_measured_leaves_a_gap(tmp_path: Path):
    nan = float("nan")
    panels = [Panel("Tokens", "tokens/s", {"a": [nan, 2.0], "b": [nan, nan]})]
    draw(str(tmp_path / "gap.png"), "tiny", "clients", ["1", "2"], panels)
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match=r"expected a name that ends in \.png or \.svg"):
        check_plot("plot.pdf")
    with pytest.raises(UsageError, match="there is no such directory"):
        check_plot(str(tmp_path / "none" / "plot.svg"))
    check_plot(str(tmp_path / "plot.svg"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"needs matplotlib: pip install 'xlane\[plot\]'"):
        check_plot(str(tmp_path / "plot.svg"))
