"""The offline benchmark: a table for people, one JSON line last, numbers that fit together."""

import json
from pathlib import Path

import pytest

from tests.support.untrained import untrained_model
from xlane.engine import EngineConfig, bench, follow, start
from xlane.engine.bench import Ceilings, measure_ceilings


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known ceilings, and the tests' own compile cache."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda platform, dtype: Ceilings(10.0, 100.0))
    monkeypatch.setattr(follow, "use_compile_cache", lambda directory: None)


def config(**changes) -> EngineConfig:
    return EngineConfig(
        **{
            "model_id": "untrained", "load_format": "dummy", "kernels": "xla", "lanes": 2, "page_tokens": 4,
            "max_total_tokens": 24, "prefill_chunk_tokens": 16, **changes,
        }
    )  # fmt: skip


OPTIONS = {"prompt_tokens": 6, "output_tokens": 7, "concurrency": ["1", "2"]}


def test_a_table_and_one_json_line_last(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = untrained_model(tmp_path, num_hidden_layers=1)
    assert bench.main(config(), model, OPTIONS) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].startswith("untrained: float32 on cpu x1, kernels xla")
    assert table[1] == "ceilings here: 10.0 GB/s read, 100 GFLOP/s matmul"
    assert table[2] == "6 prompt tokens, 7 output tokens each"
    assert [line.split()[0] for line in table[4:]] == ["1", "2"]
    assert len({len(line) for line in table[3:]}) == 1
    told = json.loads(last)
    assert (told["model"], told["ceilings"]) == (
        "untrained",
        {"read_gb_per_s": 10.0, "matmul_gflop_per_s": 100.0},
    )
    for concurrency, row in zip((1, 2), told["rows"]):
        assert (row["concurrency"], row["prompt_tokens"], row["output_tokens"]) == (concurrency, 6, 7)
        assert row["decode_tokens_per_s"] * row["step_ms"] == pytest.approx(1000 * concurrency)
        assert 0 < row["decode_of_ceiling"] < 1
        assert row["host_ms"] > 0
        assert row["gap_ms"] >= 0


def test_a_step_is_told_from_when_all_streams_run() -> None:
    early = [0.0, 1.0, 2.0, 6.0, 10.0]
    late = [2.0, 6.0, 10.0, 11.0]
    assert bench.full_step_s([early, late]) == 4.0
    assert bench.full_step_s([early]) == 2.5
    assert bench.full_step_s([[0.0, 1.0], [5.0, 8.0]]) == 2.0


def test_json_alone_is_one_line(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = untrained_model(tmp_path, num_hidden_layers=1)
    assert bench.main(config(), model, {**OPTIONS, "concurrency": ["1"], "json": True}) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)["rows"]) == 1


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_best", lambda run: 0.5)  # the arithmetic, not the machine
    ceilings = measure_ceilings("cpu", "float32")
    assert ceilings.matmul_gflop_per_s == 2 * 2048**3 / 0.5 / 1e9
    assert ceilings.read_gb_per_s == 4 * 2**27 / 0.5 / 1e9


def test_a_second_run_finds_nothing_of_the_first_in_the_prefix_cache(quick: None, tmp_path: Path) -> None:
    engine = start.start(config(), untrained_model(tmp_path, num_hidden_layers=1))
    for run in (1, 2):
        bench.measure(engine, Ceilings(10.0, 100.0), 1, 6, 7)
        # Once for the prompt alone, and again for the two tokens that fill no page.
        assert engine.stats().prefill_tokens == (6 + 2) * run
    engine.stop()
