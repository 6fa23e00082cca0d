"""What a guided stream gets beside free ones, and what a free one pays for it: tokens a second of one stream of each kind.

    python -m tests.bench.guided [--rounds 3] [--mixes 0+1,1+0,1+1,7+1,1+7]

In this process, on the demo model, in turns: so many guided streams (a list of texts, nearly every token of which is sampled) and
so many free ones (`guided+free`), all from the start to the end of the window. Medians of the rounds, one JSON line last.
"""

import argparse
import asyncio
import json
import statistics
import time

import numpy as np
from llguidance import LLMatcher

from tests.bench.overhead import config
from xlane.engine.engine import Engine
from xlane.engine.local import LocalClient
from xlane.engine.request import Request, SamplingParams
from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.guidance import guidance_tokenizer
from xlane.models.opened import open_model
from xlane.models.tokenizer import TextTokenizer
from xlane.tpu.runtime import use_compile_cache

PROMPT, WINDOW_S, WARM_S = 64, 6.0, 1.5
GRAMMAR = LLMatcher.grammar_from_json_schema(
    {"type": "array", "items": {"type": "string", "minLength": 400}, "minItems": 20},
    overrides={"whitespace_flexible": False},
)


async def rates(engine: Engine, guided: int, free: int) -> dict[str, float]:
    """Tokens a second of one stream, by kind."""
    client, counts, stop = LocalClient(engine), {"guided": 0, "free": 0}, asyncio.Event()

    async def one(kind: str, number: int) -> None:
        rng = np.random.default_rng(number)
        asked = Request(
            id=f"{kind}-{number}-{time.perf_counter()}",
            prompt_ids=tuple(rng.integers(10, engine.info.vocab_size, PROMPT).tolist()),
            sampling=SamplingParams(max_tokens=4000, temperature=1.0, seed=number),
            grammar=GRAMMAR if kind == "guided" else None,
        )
        stream = client.submit(asked)
        async for output in stream:
            counts[kind] += len(output.tokens)
            if stop.is_set():
                break
        await stream.aclose()

    tasks = [asyncio.create_task(one("guided", n)) for n in range(guided)]
    tasks += [asyncio.create_task(one("free", n)) for n in range(free)]
    await asyncio.sleep(WARM_S)
    before, start = dict(counts), time.perf_counter()
    await asyncio.sleep(WINDOW_S)
    took_s = time.perf_counter() - start
    seen = {kind: counts[kind] - before[kind] for kind in counts}
    stop.set()
    await asyncio.gather(*tasks)
    return {
        kind: seen[kind] / took_s / number for kind, number in (("guided", guided), ("free", free)) if number
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixes", default="0+1,1+0,1+1,7+1,1+7,0+8")
    args = parser.parse_args()
    use_compile_cache(default_cache_dir() / "programs")
    path = demo_model(default_cache_dir())
    opened = open_model(path)
    tokenizer = TextTokenizer.from_path(path)
    engine = Engine.build(
        config(lanes=16),
        opened.config,
        opened.source,
        guidance=lambda: guidance_tokenizer(tokenizer, opened.config.vocab_size),
    )
    seen: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for mix in args.mixes.split(","):
            guided, free = map(int, mix.split("+"))
            for kind, rate in asyncio.run(rates(engine, guided, free)).items():
                seen.setdefault(f"{mix} {kind}", []).append(rate)
    engine.stop()
    medians = {name: round(statistics.median(values), 2) for name, values in seen.items()}
    for name, value in medians.items():
        print(f"{name:>12}: {value:6.2f} tokens/s a stream ({', '.join(f'{v:.1f}' for v in seen[name])})")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
