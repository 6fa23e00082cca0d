"""What weights, keys and values in few bits cost and bring: quality beside speed and memory.

    python -m tests.bench.quality [--kinds float32,int8,int4,int8-kv] [--rounds 3] [--kernels auto]

Quality is measured on `quality.txt` (the first pages of Carroll's "Alice", and our own words), read in windows: perplexity,
and how often the likeliest next token is the one that float32 finds likeliest. Speed is the median time of a step in the
quickest of some rounds, kinds in turns: other work on the machine only adds. Prints a table, and one JSON line last.
"""

import argparse
import asyncio
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from xlane.engine.config import EngineConfig
from xlane.engine.engine import Engine
from xlane.engine.local import LocalClient
from xlane.engine.request import Request, SamplingParams, TokenOutput
from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.opened import OpenedModel, open_model
from xlane.models.tokenizer import TextTokenizer
from xlane.tpu.runtime import use_compile_cache

TEXT = Path(__file__).with_name("quality.txt")
WINDOW = 512
PROMPT, OUTPUT = 128, 64
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int8-kv": {"kv_dtype": "int8"},
    "int8+int8-kv": {"quantize": "int8", "kv_dtype": "int8"},
}


@dataclass(frozen=True, slots=True)
class Quality:
    """What an engine makes of a text."""

    perplexity: float
    likeliest: tuple[int, ...]
    """The token it finds likeliest, at each place but the first of a window."""

    def agreement(self, other: "Quality") -> float:
        """Share of places where both find the same token likeliest."""
        return float(np.mean(np.array(self.likeliest) == np.array(other.likeliest)))


def quality(engine: Engine, ids: Sequence[int]) -> Quality:
    """Read a text in windows."""
    read: list[TokenOutput] = []
    for start in range(0, len(ids), WINDOW):
        read += asyncio.run(_scored(engine, tuple(ids[start : start + WINDOW])))
    logprobs = [token.logprob for token in read if token.logprob is not None]
    return Quality(math.exp(-statistics.fmean(logprobs)), tuple(token.top[0][0] for token in read))


async def _scored(engine: Engine, ids: tuple[int, ...]) -> tuple[TokenOutput, ...]:
    asked = Request(
        id=f"{hash(ids)}",
        prompt_ids=ids,
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        prompt_logprobs=1,
    )
    outputs = [output async for output in LocalClient(engine).submit(asked)]
    return outputs[0].prompt


def step_ms(engine: Engine, streams: int) -> float:
    """Median time between two tokens of a stream, `streams` at once."""

    async def one(client: LocalClient, number: int) -> list[float]:
        prompt = np.random.default_rng(number).integers(10, engine.info.vocab_size, PROMPT).tolist()
        sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.0)
        asked = Request(id=f"{number}-{time.perf_counter()}", prompt_ids=tuple(prompt), sampling=sampling)
        return [time.perf_counter() async for _ in client.submit(asked)]

    async def all_at_once() -> list[list[float]]:
        client = LocalClient(engine)
        return list(await asyncio.gather(*(one(client, number) for number in range(streams))))

    moments = asyncio.run(all_at_once())
    return 1e3 * statistics.median(b - a for stream in moments for a, b in pairwise(stream))


def prefill_s(engine: Engine, ids: Sequence[int]) -> float:
    """Seconds to the first token behind one prompt of WINDOW tokens that the prefix cache does not know."""
    name = f"prefill-{time.perf_counter()}"
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    asked = Request(id=name, prompt_ids=tuple(ids[:WINDOW]), sampling=sampling, cache_salt=name)

    async def run() -> None:
        async for _ in LocalClient(engine).submit(asked):
            pass

    started = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - started


def build(kind: str, opened: OpenedModel, kernels: str) -> Engine:
    """An engine of the demo model, in one kind."""
    config = EngineConfig(
        model_id="demo", cache_dir=str(default_cache_dir()), kv_bytes=256 * 2**20, max_total_tokens=1024,
        lanes=16, kernels=kernels, **KINDS[kind],
    )  # fmt: skip
    return Engine.build(config, opened.config, opened.source)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="float32 is always there, first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", default="auto")
    args = parser.parse_args()
    kinds = list(dict.fromkeys(["float32", *args.kinds.split(",")]))
    path = demo_model(default_cache_dir())
    use_compile_cache(default_cache_dir() / "programs")
    opened = open_model(path)
    ids = TextTokenizer.from_path(path).encode(TEXT.read_text(encoding="utf-8"))
    engines = {kind: build(kind, opened, args.kernels) for kind in kinds}
    seen = {kind: quality(engine, ids) for kind, engine in engines.items()}
    times: dict[str, dict[str, list[float]]] = {kind: {"1": [], "16": [], "prefill": []} for kind in kinds}
    for _ in range(args.rounds):
        for kind, engine in engines.items():
            times[kind]["1"].append(step_ms(engine, 1))
            times[kind]["16"].append(step_ms(engine, 16))
            times[kind]["prefill"].append(prefill_s(engine, ids))
    print(f"{len(ids)} tokens in windows of {WINDOW}; kernels {engines['float32'].info.kernels}")
    print(
        "| kind | weights | KV a token | perplexity | same likeliest token | step, 1 stream | 16 | prefill |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for kind, engine in engines.items():
        one, many, first = (min(values) for values in times[kind].values())
        prefill = WINDOW / first
        row = {
            "kind": kind,
            "weights_mb": engine.memory.weights_bytes / 1e6,
            "kv_kb_a_token": engine.memory.kv_bytes / engine.memory.kv_tokens / 1e3,
            "perplexity": seen[kind].perplexity,
            "agreement": seen[kind].agreement(seen["float32"]),
            "step_1_ms": one,
            "step_16_ms": many,
            "prefill_tokens_per_s": prefill,
        }
        rows.append(row)
        print(
            f"| {kind} | {row['weights_mb']:.0f} MB | {row['kv_kb_a_token']:.1f} kB | {row['perplexity']:.3f} | "
            f"{row['agreement']:.1%} | {one:.1f} ms | {many:.1f} ms | {prefill:.0f} tokens/s |"
        )
        engine.stop()
    print(json.dumps({"kernels": args.kernels, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
