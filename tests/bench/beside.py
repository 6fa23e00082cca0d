"""What streams notice of a long prompt: the time between their tokens while it is computed, against a quiet time before.

    python -m tests.bench.beside [STREAMS ...] [--prompt-tokens 4096] [--quiet-s 8]

On the demo model, through the engine in this process. One JSON line for each number of streams: percentiles of the pauses in
ms, quiet and beside the prompt, their ratio (asked for is at most 2 in the 99th), and the prompt's own first token.
"""

import argparse
import asyncio
import json
import time
from itertools import pairwise

import numpy as np

from xlane.engine.config import EngineConfig, programs_folder
from xlane.engine.engine import Engine
from xlane.engine.local import LocalClient
from xlane.engine.request import Request, SamplingParams
from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.opened import open_model
from xlane.tpu.runtime import use_compile_cache

PERCENTILES = (50, 90, 99)


def request(name: str, prompt_tokens: int, max_tokens: int) -> Request:
    """Random tokens, that no cache has."""
    prompt = np.random.default_rng().integers(10, 40_000, prompt_tokens).tolist()
    return Request(
        id=name, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0)
    )


async def stream(
    client: LocalClient, name: str, most: int, moments: list[float], ended: asyncio.Event
) -> None:
    """Note when each token comes, until all has been seen."""
    outputs = client.submit(request(name, 64, most))
    async for _ in outputs:
        moments.append(time.perf_counter())
        if ended.is_set():
            break
    await outputs.aclose()


def pauses(moments: list[list[float]], begin: float, end: float) -> dict[str, float]:
    found = [1e3 * (b - a) for one in moments for a, b in pairwise(one) if a >= begin and b <= end]
    return {f"p{p}": round(float(np.percentile(found, p)), 1) for p in PERCENTILES}


async def beside(engine: Engine, streams: int, prompt_tokens: int, quiet_s: float) -> dict[str, object]:
    client, ended = LocalClient(engine), asyncio.Event()
    moments: list[list[float]] = [[] for _ in range(streams)]
    most = engine.info.max_total_tokens - 64
    tasks = [
        asyncio.create_task(stream(client, f"{streams}-{number}", most, seen, ended))
        for number, seen in enumerate(moments)
    ]
    while not all(len(seen) > 8 for seen in moments):
        await asyncio.sleep(0.05)
    started = time.perf_counter()
    await asyncio.sleep(quiet_s)
    begun = time.perf_counter()
    async for _ in client.submit(request(f"{streams}-long", prompt_tokens, 1)):
        pass
    done = time.perf_counter()
    ended.set()
    await asyncio.gather(*tasks)
    quiet, during = pauses(moments, started, begun), pauses(moments, begun, done)
    ratio = {name: round(during[name] / quiet[name], 2) for name in quiet}
    return {"streams": streams, "quiet_ms": quiet, "beside_ms": during, "ratio": ratio, "first_token_s": round(done - begun, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("streams", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--quiet-s", type=float, default=8.0)
    args = parser.parse_args()
    config = EngineConfig(model_id="demo", cache_dir=str(default_cache_dir()))
    use_compile_cache(programs_folder(config))
    opened = open_model(demo_model(default_cache_dir()))
    engine = Engine.build(config, opened.config, opened.source)
    try:
        for streams in args.streams:
            told = asyncio.run(beside(engine, streams, args.prompt_tokens, args.quiet_s))
            print(json.dumps(told), flush=True)
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
