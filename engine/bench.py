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
from os import cpu_count
from pathlib import Path
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
    total_s: float


def main(config: EngineConfig, path: Path, options: Mapping[str, Any]) -> int:
    """Measure and print. Returns the exit code."""
    engine = start(config, path)
    ceilings = measure_ceilings(engine.info.platform, engine.info.dtype)
    prompt, output = options["prompt_tokens"], options["output_tokens"]
    rows = []
    for concurrency in map(int, options["concurrency"]):
        asyncio.run(_run(engine, concurrency, prompt, 4))  # the first use of a program touches fresh memory
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
    """Run `concurrency` requests at once and set the times against the ceilings."""
    firsts, total_s = asyncio.run(_run(engine, concurrency, prompt, output))
    prefill_s = max(firsts)
    decode_s = total_s - prefill_s
    steps = max(1, output - 1)
    step_s = decode_s / steps
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
        host_ms=engine.stats().gap_ms,
        total_s=total_s,
    )


async def _run(engine: Engine, concurrency: int, prompt: int, output: int) -> tuple[list[float], float]:
    """Seconds to the first token of each request, and until the last of all."""
    client = LocalClient(engine)
    rng = np.random.default_rng(concurrency)
    started = time.perf_counter()

    async def one(number: int) -> float:
        ids = tuple(rng.integers(10, engine.info.vocab_size, prompt).tolist())
        sampling = SamplingParams(max_tokens=output, temperature=0.0)
        name = f"bench-{number}-{started}"
        first = 0.0
        # A salt of its own: what an earlier run left in the prefix cache would make this one's prefill look quick.
        async for _ in client.submit(Request(id=name, prompt_ids=ids, sampling=sampling, cache_salt=name)):
            first = first or time.perf_counter() - started
        return first

    firsts = await asyncio.gather(*(one(number) for number in range(concurrency)))
    return list(firsts), time.perf_counter() - started


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
