"""`xlane bench serve` on xlane: the front over hand arithmetic, and the whole product. Its counts are the server's."""

import json
from pathlib import Path

import httpx
import pytest

from xlane.server.cli import run


@pytest.mark.parametrize("api", ["openai", "chat", "tgi"])
def test_a_closed_loop(server_url: str, model: str, api: str, capsys: pytest.CaptureFixture[str]):
    words = f"bench serve --url {server_url} --api {api} --concurrency 1,3 --requests 4 --prompt-tokens 40"
    assert run([*words.split(), "--output-tokens", "6", "--slo", "e2e_ms=600000"], {}) == 0
    one, three = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    for row, clients in ((one, 1), (three, 3)):
        assert (row["concurrency"], row["requests"], row["failed"], row["within_slo"]) == (clients, 4, 0, 4)
        assert (row["output_tokens"], row["short"]) == (6, 0)
        # A byte tokenizer cannot end whole words at any length; a chat's template adds tokens of its own.
        off, template = 0 if model == "demo" else 8, 60 if api == "chat" else 0
        assert 40 - off <= row["prompt_tokens"] <= 40 + off + template
        assert 24 / row["output_tokens_per_s"] == pytest.approx(
            row["seconds"], rel=0.005, abs=0.001
        )  # both are rounded


def test_an_open_loop_over_a_file(server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"prompt": "Say the alphabet, please.", "output_tokens": 4}\n'
        '{"conversations": [{"value": "Say it."}, {"value": "a b c"}]}\n'
    )

    def tokens(text: str) -> int:
        return len(httpx.post(f"{server_url}/tokenize", json={"inputs": text}).json())

    words = f"bench serve --url {server_url} --rate 50 --requests 4 --workload {path} --warmup 0 --json"
    assert run(words.split(), {}) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert (row["rate"], row["requests"], row["failed"], row["short"]) == (50, 4, 0, 0)
    # Each entry comes twice.
    assert row["prompt_tokens"] == pytest.approx(
        (tokens("Say the alphabet, please.") + tokens("Say it.")) / 2, abs=0.06
    )
    assert row["output_tokens"] == pytest.approx((4 + tokens("a b c")) / 2, abs=0.06)


def test_a_refusal_is_a_failure_with_its_status(server_url: str, capsys: pytest.CaptureFixture[str]):
    words = f"bench serve --url {server_url} --concurrency 1 --requests 2 --prompt-tokens 4 --warmup 0"
    assert run([*words.split(), "--extra-body", '{"temperature": -1}'], {}) == 3
    told = capsys.readouterr()
    (row,) = json.loads(told.out.splitlines()[-1])["runs"]
    (kind,) = row["errors"]
    assert (kind[:6], row["errors"][kind], row["failed"], row["output_tokens_per_s"]) == ("HTTP 4", 2, 2, 0)
    assert "2 of 2 failed" in told.err
