"""`xlane bench`: how fast the engine is in this process, next to what the machine could do at most.

Decoding reads every weight and the lanes' KV once a step, so memory bandwidth bounds it; with many rows, and in prefill,
arithmetic does. Both ceilings are measured here, with the machine's own best means, before the engine runs. Prints a
table, and one JSON line last. No HTTP, no text: `xlane bench serve` measures those.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from os import cpu_count
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .config import EngineConfig
from .engine import Engine
from .local import LocalClient
from .request import Request, SamplingParams
from .start import start

COLUMNS = (
    ("lanes", "concurrency", "{:d}"),
    ("prefill tok/s", "prefill_tokens_per_s", "{:.0f}"),
    ("of ceiling", "prefill_of_ceiling", "{:.0%}"),
    ("decode tok/s", "decode_tokens_per_s", "{:.1f}"),
    ("step ms", "step_ms", "{:.2f}"),
    ("of ceiling", "decode_of_ceiling", "{:.0%}"),
    ("host ms", "host_ms", "{:.2f}"),
    ("gap ms", "gap_ms", "{:.2f}"),
)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this machine can do at most, measured."""

    read_gb_per_s: float
    matmul_gflop_per_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One run: `concurrency` requests at once, all of the same lengths."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    prefill_tokens_per_s: float
    prefill_of_ceiling: float
    decode_tokens_per_s: float
    step_ms: float
    decode_of_ceiling: float
    host_ms: float
    """The host's work a turn, beside the device."""
    gap_ms: float
    """The device's wait for its next launch."""


def main(config: EngineConfig, path: Path, options: Mapping[str, Any]) -> int:
    """Measure and print. Returns the exit code."""
    engine = start(config, path)
    engine.wait_loaded()
    ceilings = measure_ceilings(engine.info.platform, engine.info.dtype)
    prompt, output = options["prompt_tokens"], options["output_tokens"]
    rows = []
    for concurrency in map(int, options["concurrency"]):
        # The first use of a program touches fresh memory.
        asyncio.run(_run(engine, concurrency, prompt, 4, "warm"))
        rows.append(measure(engine, ceilings, concurrency, prompt, output))
    engine.stop()
    if not options.get("json"):
        print(table(engine, ceilings, rows))
    info = engine.info
    summary = {
        "model": config.model_id,
        "dtype": info.dtype,
        "quantize": info.quantize,
        "kv_dtype": info.kv_dtype,
        "kernels": info.kernels,
    }
    print(json.dumps({**summary, "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}))
    return 0


def measure(engine: Engine, ceilings: Ceilings, concurrency: int, prompt: int, output: int) -> Row:
    """Run `concurrency` requests at once, first for their prompts alone, and set the times against the ceilings."""
    name = f"bench-{time.perf_counter()}"
    prefill_s = max(moments[-1] for moments in asyncio.run(_run(engine, concurrency, prompt, 1, name)))
    # The prompts are found now, so that all lanes decode together from early on.
    step_s = full_step_s(asyncio.run(_run(engine, concurrency, prompt, output, name)))
    stats = engine.stats()
    memory = engine.memory
    flop_per_token = 2 * engine.info.parameters
    held = concurrency * (prompt + output / 2)
    read = memory.weights_bytes + held * memory.kv_bytes / memory.kv_tokens
    at_least_s = max(
        read / (ceilings.read_gb_per_s * 1e9),
        concurrency * flop_per_token / (ceilings.matmul_gflop_per_s * 1e9),
    )
    prefill_rate = concurrency * prompt / prefill_s
    return Row(
        concurrency=concurrency,
        prompt_tokens=prompt,
        output_tokens=output,
        prefill_tokens_per_s=prefill_rate,
        prefill_of_ceiling=prefill_rate * flop_per_token / (ceilings.matmul_gflop_per_s * 1e9),
        decode_tokens_per_s=concurrency / step_s,
        step_ms=step_s * 1e3,
        decode_of_ceiling=at_least_s / step_s,
        host_ms=stats.host_ms,
        gap_ms=stats.gap_ms,
    )


def full_step_s(streams: list[list[float]]) -> float:
    """Mean time between two tokens of a stream while all of them run; of all, if they never do. Takes the times of each
    stream's tokens."""
    began, ended = max(moments[0] for moments in streams), min(moments[-1] for moments in streams)
    gaps = [(a, b) for moments in streams for a, b in pairwise(moments)]
    together = [(a, b) for a, b in gaps if a >= began and b <= ended]
    return fmean(b - a for a, b in together or gaps)


async def _run(engine: Engine, concurrency: int, prompt: int, output: int, salt: str) -> list[list[float]]:
    """When each request got its tokens, in seconds since the start. What runs of another salt left in the prefix cache is
    not found."""
    client = LocalClient(engine)
    rng = np.random.default_rng(concurrency)
    started = time.perf_counter()

    async def one(number: int) -> list[float]:
        ids = tuple(rng.integers(10, engine.info.vocab_size, prompt).tolist())
        sampling = SamplingParams(max_tokens=output, temperature=0.0)
        request = Request(id=f"{salt}-{number}-{started}", prompt_ids=ids, sampling=sampling, cache_salt=salt)
        return [time.perf_counter() - started async for _ in client.submit(request)]

    return list(await asyncio.gather(*(one(number) for number in range(concurrency))))


def measure_ceilings(platform: str, dtype: str) -> Ceilings:
    """The best of a few tries at reading memory and at a large matmul."""
    size = 2048 if platform == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a, b: a @ b).lower(square, square).compile()
    matmul_s = _best(lambda: multiply(square, square).block_until_ready())
    return Ceilings(_read_gb_per_s(platform), 2 * size**3 / matmul_s / 1e9)


def _read_gb_per_s(platform: str) -> float:
    count = 2**27 if platform == "cpu" else 2**30
    if platform == "cpu":
        # XLA:CPU sums on one thread; a copy of the truth needs all cores.
        parts = np.array_split(np.ones(count, np.float32), cpu_count() or 1)
        with ThreadPoolExecutor(len(parts)) as pool:
            return 4 * count / _best(lambda: list(pool.map(np.max, parts))) / 1e9
    ones = jnp.ones(count, jnp.float32)
    total = jax.jit(jnp.sum).lower(ones).compile()
    return 4 * count / _best(lambda: total(ones).block_until_ready()) / 1e9


def _best(run: Any, tries: int = 5) -> float:
    times = []
    for _ in range(tries + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def table(engine: Engine, ceilings: Ceilings, rows: list[Row]) -> str:
    """For people."""
    info = engine.info
    lines = [
        f"{info.model_id}: {info.precision} on {info.device_kind} x{info.device_count}, kernels {info.kernels}",
        f"ceilings here: {ceilings.read_gb_per_s:.1f} GB/s read, {ceilings.matmul_gflop_per_s:.0f} GFLOP/s matmul",
        f"{rows[0].prompt_tokens} prompt tokens, {rows[0].output_tokens} output tokens each" if rows else "",
        "  ".join(f"{name:>13}" for name, _, _ in COLUMNS),
    ]
    for row in rows:
        values = (form.format(getattr(row, field)) for _, field, form in COLUMNS)
        lines.append("  ".join(f"{value:>13}" for value in values))
    return "\n".join(lines)
