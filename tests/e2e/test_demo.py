"""The whole product with a real model: what it says, under load, and when its engine is killed."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from xlane.models.demo import default_cache_dir, demo_model

from ..bench.kills import kill_under_load
from ..support.whole_server import Served
from .make_demo_greedy import PATH, TOKENS, greedy, reference_model

pytestmark = pytest.mark.slow

CASES = json.loads(PATH.read_text())


async def complete(client: httpx.AsyncClient, prompt: list[int], **fields: Any) -> list[dict]:
    """The streamed chunks of one completion of token ids."""
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        **fields,
    }
    chunks = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                chunks.append(chunk)
    return chunks


def text_of(chunks: list[dict]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def all_at_once(served: Served, cases: list[dict], **fields: Any) -> list[str]:
    async with httpx.AsyncClient(base_url=served.url, timeout=300) as client:
        answers = await asyncio.gather(*(complete(client, case["prompt"], **fields) for case in cases))
    return [text_of(chunks) for chunks in answers]


@pytest.fixture(scope="session")
def expected() -> list[str]:
    """transformers' answers as text, special tokens left out."""
    from xlane.models.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.from_path(demo_model(default_cache_dir()))
    return [tokenizer.decode(case["output"], skip_special_tokens=True) for case in CASES]


def test_greedy_text_equals_transformers_while_all_share_the_batch(demo: Served, expected: list[str]) -> None:
    assert len(CASES) >= 20
    assert asyncio.run(all_at_once(demo, CASES, ignore_eos=True)) == expected


def test_the_kept_answers_are_what_transformers_says_today() -> None:
    model = reference_model(demo_model(default_cache_dir()))
    for case in (CASES[0], CASES[-2]):
        assert greedy(model, case["prompt"], 16) == case["output"][:16]


def test_killed_engines_lose_and_repeat_no_token_of_any_kind_of_stream(demo: Served) -> None:
    """Guided, with tools, seeded or greedy: all go on over two deaths of the engine as if nothing had happened."""
    tallies, killing = asyncio.run(kill_under_load(demo, times=2))
    assert killing.count == 2
    assert {name: tally.wrong for name, tally in tallies.items()} == {name: [] for name in tallies}
    assert all(tally.killed for tally in tallies.values())


def test_a_dropped_connection_frees_its_lane(demo: Served) -> None:
    def lanes() -> int:
        found = re.search(r"^xlane_lanes_active (\d+)", httpx.get(f"{demo.url}/metrics").text, re.MULTILINE)
        assert found is not None
        return int(float(found.group(1)))

    body = {"model": "demo", "prompt": "Count: 1, 2,", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{demo.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: dropping the iterator closes the connection
        assert next(lines).startswith("data: ")
        _within(10, lambda: lanes() == 1)
    _within(10, lambda: lanes() == 0)


def _within(seconds: float, holds: Callable[[], bool]) -> None:
    """The metrics are a snapshot that is a moment old, and the machine may be busy."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def test_nothing_compiled_after_ready(demo: Served) -> None:
    metrics = httpx.get(f"{demo.url}/metrics").text
    assert re.search(r"^xlane_compiles_after_ready_total 0(\.0)?$", metrics, re.MULTILINE), metrics
