"""One process of a group that serves a tiny model: `python -m tests.support.group_process MODEL CONFIG [REQUESTS]`, both
JSON. The leader prints each request's tokens; asked for `forever`, it prints `running` and goes on until it is stopped."""

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.engine.conftest import ids, request, run
from tests.support.few_programs import few_programs
from xlane.engine import EngineConfig, EngineError, Request
from xlane.engine.engine import Engine
from xlane.engine.follow import follow
from xlane.engine.local import LocalClient
from xlane.engine.start import start

DRAIN_S = 2.0
"""How long a follower goes on after SIGTERM."""


def main() -> int:
    model, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    config = EngineConfig(model_id="tiny", **options)
    try:
        with few_programs():
            if config.process_id:
                follow(config, model, drain_s=DRAIN_S)
                return 0
            engine = start(config, model)
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 3
    if sys.argv[3] == "forever":
        asyncio.run(_run_forever(engine))
    asked = [_request(prompt, **sampling) for prompt, sampling in json.loads(sys.argv[3])]
    print(json.dumps([ids(output) for output in run(engine, *asked)]))
    assert engine.stats().compiles_after_ready == 0
    assert (engine.stats().accepted.sum > 0) == (config.speculate > 0)
    engine.stop()
    return 0


def _request(prompt: list[int], grammar: str | None = None, **sampling: Any) -> Request:
    return replace(request(prompt, **sampling), grammar=grammar)


async def _run_forever(engine: Engine) -> None:
    while True:
        async for _ in LocalClient(engine).submit(request([5, 6, 7], max_tokens=50)):
            print("running", flush=True)
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
