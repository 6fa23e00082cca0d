"""How a step's time grows: with the lanes that decode, the context each holds, the longest request allowed, a prompt's length.

    python -m tests.bench.growth [--rounds 3] [--only lanes,held,allowed,prompt]

On the demo model, the compiled programs alone (`bare.py`), medians of all steps of all rounds, in turns. The longest request
allowed must not matter; of the others each table shows what one more costs. Markdown tables, one JSON line last.
"""

import argparse
import json
import statistics
from collections.abc import Callable

from tests.bench.bare import Bare
from xlane.engine.config import EngineConfig
from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.opened import open_model
from xlane.tpu.runtime import use_compile_cache

STEPS = 24
LANES = (1, 2, 4, 8, 16, 32, 64)
HELD = (64, 256, 1024, 4096, 8000)
ALLOWED = (512, 2048, 8192)
PROMPTS = (16, 64, 128, 512, 1024, 2048, 4096)
KV_BYTES = 2**30


def bare(opened, **options) -> Bare:
    config = EngineConfig(model_id="demo", kv_bytes=KV_BYTES, cache_dir=str(default_cache_dir()), **options)
    return Bare(config, opened)


def lanes(opened) -> dict[str, Callable[[], list[float]]]:
    wide = bare(opened, lanes=64, max_total_tokens=512)
    return {f"{rows} lanes": lambda rows=rows: wide.step_ms(rows, 128, STEPS) for rows in LANES}


def held(opened) -> dict[str, Callable[[], list[float]]]:
    one = bare(opened, lanes=1)
    return {f"{tokens} tokens": lambda tokens=tokens: one.step_ms(1, tokens, STEPS) for tokens in HELD}


def allowed(opened) -> dict[str, Callable[[], list[float]]]:
    """Each is an engine of its own."""
    made = {most: bare(opened, lanes=1, max_total_tokens=most) for most in ALLOWED}
    return {f"{most} tokens": lambda most=most: made[most].step_ms(1, 128, STEPS) for most in ALLOWED}


def prompt(opened) -> dict[str, Callable[[], list[float]]]:
    one = bare(opened, lanes=1)
    return {f"{tokens} tokens": lambda tokens=tokens: [one.prompt_ms(tokens)] for tokens in PROMPTS}


TABLES = {
    "lanes": ("lanes that decode, 128 tokens held each", lanes),
    "held": ("context held by one lane", held),
    "allowed": ("longest request allowed, one lane, 128 tokens held", allowed),
    "prompt": ("prompt, from nothing to its first token", prompt),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(TABLES))
    args = parser.parse_args()
    use_compile_cache(default_cache_dir() / "programs")
    opened = open_model(demo_model(default_cache_dir()))
    told: dict[str, dict[str, float]] = {}
    for name in args.only.split(","):
        title, make = TABLES[name]
        cases = make(opened)
        seen: dict[str, list[float]] = {case: [] for case in cases}
        for run in cases.values():
            run()  # The first use touches fresh memory.
        for _ in range(args.rounds):
            for case, run in cases.items():
                seen[case] += run()
        told[name] = {case: round(statistics.median(times), 2) for case, times in seen.items()}
        print(f"\n| {title} | ms |\n|---|---|")
        for case, value in told[name].items():
            print(f"| {case} | {value:.1f} |", flush=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
