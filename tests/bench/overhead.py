"""What lies between the device's own step and a client, and what a step's length depends on.

    python -m tests.bench.overhead [--rounds 5] [--rows 1,16] [--json]

In turns, on the demo model: the compiled step alone, launched as the engine launches it (the next before the last is
read); the whole engine in this process; the server, through HTTP. Then one stream on engines that differ in one setting:
lanes (one must not pay for sixteen), and the longest request allowed (it must not matter). Medians of the rounds, one
JSON line last.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from itertools import pairwise

import numpy as np

from tests.bench.bare import Bare
from tests.bench.peers import free_port, load, server
from xlane.engine.config import EngineConfig
from xlane.engine.engine import Engine
from xlane.engine.local import LocalClient
from xlane.engine.request import Request, SamplingParams
from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.opened import open_model
from xlane.tpu.runtime import use_compile_cache

PROMPT, OUTPUT = 128, 96
KV_BYTES = 512 * 2**20


def median_gap_ms(streams: list[list[float]]) -> float:
    """Of the times between two tokens. A step that waited for another stream's prefill is no median."""
    return 1e3 * statistics.median(b - a for moments in streams for a, b in pairwise(moments))


def config(**options) -> EngineConfig:
    return EngineConfig(model_id="demo", kv_bytes=KV_BYTES, cache_dir=str(default_cache_dir()), **options)


def engine_ms(engine: Engine, rows: int) -> float:
    """Milliseconds between two tokens of a stream, `rows` at once."""

    async def one(client: LocalClient, number: int) -> list[float]:
        rng = np.random.default_rng(number)
        prompt = tuple(rng.integers(10, engine.info.vocab_size, PROMPT).tolist())
        asked = Request(
            id=f"{number}-{time.perf_counter()}",
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=OUTPUT, temperature=0.0),
        )
        return [time.perf_counter() async for _ in client.submit(asked)]

    async def all_at_once() -> float:
        client = LocalClient(engine)
        moments = await asyncio.gather(*(one(client, number) for number in range(rows)))
        return median_gap_ms(moments)

    return asyncio.run(all_at_once())


def http_ms(url: str, rows: int) -> float:
    """The same through the server: the median time between two tokens, which other streams' prefills do not touch."""
    requests = max(4, rows)
    run = load(url, clients=rows, requests=requests, api="openai", prompt_tokens=PROMPT, output_tokens=OUTPUT)
    return run.itl_ms.p50


def settings(opened) -> dict[str, Engine]:
    """Engines that differ from the first in one thing."""
    made = {
        "16 lanes, 8192 tokens": config(lanes=16),
        "1 lane, 8192 tokens": config(lanes=1),
        "16 lanes, 4096 tokens": config(lanes=16, max_total_tokens=4096),
        "16 lanes, 512 tokens": config(lanes=16, max_total_tokens=512),
    }
    return {name: Engine.build(options, opened.config, opened.source) for name, options in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default="1,16")
    args = parser.parse_args()
    rows = [int(number) for number in args.rows.split(",")]
    use_compile_cache(default_cache_dir() / "programs")
    opened = open_model(demo_model(default_cache_dir()))
    bare, engines = Bare(config(lanes=16), opened), settings(opened)
    whole = next(iter(engines.values()))
    seen: dict[str, list[float]] = {}
    command = [
        sys.executable,
        "-m",
        "xlane.server",
        "serve",
        "--max-batch-size",
        "16",
        "--kv-bytes",
        str(KV_BYTES),
    ]
    with server(command, free_port()) as (url, _):
        http_ms(url, 2)
        for _ in range(args.rounds):
            for count in rows:
                seen.setdefault(f"bare step, {count} rows", []).append(
                    statistics.median(bare.step_ms(count, PROMPT, OUTPUT - 1))
                )
                seen.setdefault(f"engine, {count} streams", []).append(engine_ms(whole, count))
                seen.setdefault(f"http, {count} streams", []).append(http_ms(url, count))
            for name, engine in engines.items():
                seen.setdefault(f"one stream of {name}", []).append(engine_ms(engine, 1))
    for engine in engines.values():
        engine.stop()
    medians = {name: round(statistics.median(values), 2) for name, values in seen.items()}
    for name, value in medians.items():
        print(f"{name:>40}: {value:7.2f} ms  ({', '.join(f'{v:.1f}' for v in seen[name])})")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
