"""What streams notice of a long prompt: the time between their tokens while it is computed, against quiet times before and after.

    python -m tests.bench.beside [STREAMS ...] [--lanes 32] [--prompt-tokens 4096] [--quiet-s 8]

On the demo model, through the engine in this process. One JSON line for each number of streams: percentiles of the pauses in
ms, before, after, of both and beside the prompt, the ratio of the last two (asked for is at most 2 in the 99th), and the
prompt's own first token. Meanwhile the streams themselves grow, by a thousand tokens each if it is long: so it is both.
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


def pauses(moments: list[list[float]], *spans: tuple[float, float]) -> dict[str, float]:
    """Percentiles of the pauses that lie within these spans."""
    found = [
        1e3 * (b - a)
        for one in moments
        for a, b in pairwise(one)
        if any(a >= begin and b <= end for begin, end in spans)
    ]
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
    await asyncio.sleep(quiet_s)
    ended.set()
    await asyncio.gather(*tasks)
    before, after = (started, begun), (done, done + quiet_s)
    told = {
        "before_ms": pauses(moments, before),
        "after_ms": pauses(moments, after),
        "quiet_ms": (quiet := pauses(moments, before, after)),
        "beside_ms": (during := pauses(moments, (begun, done))),
        "ratio": {name: round(during[name] / quiet[name], 2) for name in quiet},
    }
    return {"streams": streams, **told, "first_token_s": round(done - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("streams", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--lanes", type=int, help="one more than streams at least: the prompt takes one, too")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--quiet-s", type=float, default=8.0)
    args = parser.parse_args()
    config = EngineConfig(model_id="demo", cache_dir=str(default_cache_dir()), lanes=args.lanes)
    use_compile_cache(programs_folder(config))
    opened = open_model(demo_model(default_cache_dir()))
    engine = Engine.build(config, opened.config, opened.source)
    try:
        if max(args.streams) >= (lanes := engine.info.lanes):
            parser.error(
                f"{lanes} lanes leave none for the prompt beside {max(args.streams)} streams: see --lanes"
            )
        for streams in args.streams:
            told = asyncio.run(beside(engine, streams, args.prompt_tokens, args.quiet_s))
            print(json.dumps(told), flush=True)
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
