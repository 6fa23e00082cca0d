"""What a turn costs the host: scheduler, plan, result and delivery of so many streams, over a device that takes no time.

    python -m tests.bench.host [--lanes 16] [--tokens 2000] [--rounds 5]

Everything is real but the launch: its result is there at once, and every row of it is a token. Processor time of the engine's
thread; dispatching the compiled program comes on top, see `docs/performance.md`. One JSON line a round.
"""

import argparse
import json
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from xlane.engine.batch import RESULT_WIDTH
from xlane.engine.buckets import SEGMENTS, decode_rows
from xlane.engine.launcher import Launcher, Made
from xlane.engine.local import Delivery
from xlane.engine.loop import Loop
from xlane.engine.pages import PageAllocator
from xlane.engine.request import Request, SamplingParams
from xlane.engine.runner import Runner
from xlane.engine.scheduler import Limits, Scheduler
from xlane.engine.sequence import Sequence
from xlane.engine.stats import Counters
from xlane.engine.step import Blueprint
from xlane.engine.turn import Size


class Instant:
    """Looks like `launcher.Launcher`: one token for each row, at once."""

    def __init__(self, lanes: int) -> None:
        self._rows = decode_rows(lanes, 1)

    def smallest(self, rows: int, tokens: int) -> Size:
        return Size(next(size for size in self._rows if size >= rows) if rows else 0, tokens)

    def launch(self, size: Size, plan: np.ndarray, mask: np.ndarray | None) -> Made:
        if not size.tokens:
            plan.tobytes()  # as the real one does, to see whether that plan is on the device already
        rows = np.full((size.rows + size.segments(SEGMENTS), RESULT_WIDTH), 1, np.int32)
        return Made(cast("Any", rows.view(_There)), None)


class _There(np.ndarray):
    """A result that needs no fetching."""

    def copy_to_host_async(self) -> None:
        pass


class Counting:
    """A sink that counts what came, and the requests that ended."""

    def __init__(self, requests: int) -> None:
        self._left, self.batches = requests, 0
        self.ended = threading.Event()

    def deliver(self, batch: list[Delivery]) -> None:
        self.batches += 1
        self._left -= sum(getattr(one, "finish_reason", None) is not None for one in batch)
        if not self._left:
            self.ended.set()


def one_round(lanes: int, tokens: int) -> dict[str, float]:
    """Streams of so many tokens, one to a lane: milliseconds a turn."""
    page_tokens, prompt = 128, [1] * 128
    width = -(-(len(prompt) + tokens) // page_tokens)
    shapes = SimpleNamespace(table_width=width, lanes=lanes, vocab=49_152)
    blueprint = SimpleNamespace(
        prefill_segments=SEGMENTS, shapes=shapes, segments=lambda size: size.segments(SEGMENTS)
    )
    runner = Runner(cast("Blueprint", blueprint), cast("Launcher", Instant(lanes)))
    limits = Limits(lanes, page_tokens, 2048, SEGMENTS)
    counters = Counters()
    used: list[float] = []

    def observe(size: Size, took_s: float, behind: int) -> None:
        used.append(time.thread_time())

    loop = Loop(runner, Scheduler(limits, PageAllocator(lanes * width)), counters, observe)
    sink = Counting(lanes)
    for lane in range(lanes):
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
        loop.submit(
            Sequence(
                Request(id=str(lane), prompt_ids=prompt, sampling=sampling), sink, lane, len(prompt) + tokens
            )
        )
    loop.start()
    sink.ended.wait()
    loop.stop()
    turns = used[len(used) // 4 :]  # the prompts and the first tokens come before
    return {
        "lanes": lanes,
        "cpu_ms": 1e3 * (turns[-1] - turns[0]) / (len(turns) - 1),
        "host_ms": counters.host_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        print(json.dumps(one_round(arguments.lanes, arguments.tokens)), flush=True)


if __name__ == "__main__":
    main()
