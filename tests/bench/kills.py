"""`kill -9` of the engine, again and again, under streams of every kind: each must say what it says undisturbed.

    python -m tests.bench.kills [--times 100] [--model demo] [--streams 2]

Serves the model with guesses on (`--speculate 4`), listens to each kind of stream undisturbed, then keeps `--streams` of each
going while the engine is killed: up to 3 s after somebody heard of it, or before it is ready. (A request that twice loses an
engine in which nothing else ran is taken to be what it died of, see `engine/replay.py`.) One JSON line last; exit code 1 if a stream
was lost, or said anything else.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from tests.bench.shaken import arguments, shaken_server
from tests.support.traffic import KINDS, Heard, Kind, heard
from tests.support.whole_server import Served

EARLY = 0.1
"""Share of the kills that hit an engine before it is ready. (Five of those in a row end the server, rightly.)"""


@dataclass
class Tally:
    """What became of the streams of one kind."""

    whole: int = 0
    """Ended, and said what they say undisturbed."""
    killed: int = 0
    """Of those, how many lived through a kill or more."""
    tokens: int = 0
    most_kills: int = 0
    wrong: list[Any] = field(default_factory=list)


class Killing:
    """Kills an engine so many times, and tells how often it has."""

    def __init__(self, served: Served, times: int) -> None:
        self._served, self._times, self._chance = served, times, random.Random(0)
        self.count = 0
        self.news = asyncio.Event()
        """Somebody has heard something."""
        self.pointless = False
        """Whether a stream went wrong."""
        self.stood_still_s = 0.0
        """Longest time this process was not run: what the machine does to it, it does to the server."""
        self.back_s: list[float] = []
        """From a kill to the next engine's health."""

    @property
    def done(self) -> bool:
        return self.count == self._times or self.pointless

    async def watch(self) -> None:
        """Notice when time passes without us."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.5)
            self.stood_still_s = max(self.stood_still_s, time.monotonic() - before - 0.5)

    async def run(self) -> None:
        """Return when the last killed engine is replaced."""
        while not self.done:
            await self.news.wait()
            await asyncio.sleep(self._chance.uniform(0.0, 3.0))
            self._kill()
            began = time.monotonic()
            if self.done or self._chance.random() > EARLY:
                while not await asyncio.to_thread(self._served.healthy):
                    await asyncio.sleep(0.1)
                self.back_s.append(time.monotonic() - began)
                self.news.clear()  # what came late from the one before

    def _kill(self) -> None:
        pid = self._served.engine_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.count += 1
            if self.count % 10 == 0:
                print(f"{self.count} kills", file=sys.stderr)


class Disturbance(Protocol):
    """What is done to a server under load."""

    count: int
    """How often it was done."""
    news: asyncio.Event
    """Set when somebody has heard something."""
    pointless: bool
    """Set when a stream went wrong."""

    @property
    def done(self) -> bool: ...

    async def run(self) -> None: ...


async def keep_asking(
    client: httpx.AsyncClient, kind: Kind, as_before: Heard, killing: Disturbance, tally: Tally
) -> None:
    """One stream after another until the killing is over."""
    while not killing.done:
        before = killing.count
        try:
            now = await heard(client, kind, killing.news.set)
            assert now.like(as_before), (as_before, now)
        except (AssertionError, httpx.HTTPError) as error:
            tally.wrong.append(repr(error))
            killing.pointless = True
            killing.news.set()
            return
        tally.whole += 1
        tally.killed += killing.count > before
        tally.most_kills = max(tally.most_kills, killing.count - before)
        tally.tokens += now.tokens


async def under_load(url: str, disturbance: Disturbance, streams: int = 1) -> dict[str, Tally]:
    """Disturb the server under `streams` of each kind."""
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits()) as client:
        undisturbed = await asyncio.gather(*(heard(client, kind) for kind in KINDS.values()))
        tallies = {name: Tally() for name in KINDS}
        asking = [
            keep_asking(client, KINDS[name], before, disturbance, tally)
            for (name, tally), before in zip(tallies.items(), undisturbed, strict=True)
            for _ in range(streams)
        ]
        await asyncio.gather(disturbance.run(), *asking)
    return tallies


async def kill_under_load(served: Served, times: int, streams: int = 1) -> tuple[dict[str, Tally], Killing]:
    """Kill the engine so many times under `streams` of each kind."""
    killing = Killing(served, times)
    watching = asyncio.create_task(killing.watch())
    tallies = await under_load(served.url, killing, streams)
    watching.cancel()
    return tallies, killing


def tell(tallies: Mapping[str, Tally]) -> dict[str, dict[str, int]]:
    """Print a line for each kind, and return the same as numbers."""
    for name, tally in tallies.items():
        print(
            f"{name:>18}: {tally.whole:5} streams whole, {tally.killed:5} of them disturbed (up to "
            f"{tally.most_kills} times each), {tally.tokens:7,} tokens, {len(tally.wrong)} wrong"
        )
        for wrong in tally.wrong:
            print(f"{'':>18}  {wrong}")
    return {
        name: {"whole": t.whole, "disturbed": t.killed, "tokens": t.tokens, "wrong": len(t.wrong)}
        for name, t in tallies.items()
    }


def main() -> int:
    args = arguments(__doc__, times=100, streams=2)
    began = time.monotonic()
    with shaken_server(args.model) as served:
        tallies, killing = asyncio.run(kill_under_load(served, args.times, args.streams))
    told = tell(tallies)
    back = sorted(killing.back_s)
    summary = {
        "kills": killing.count,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "stood_still_s": round(killing.stood_still_s, 1),
        "back_s": {"median": round(back[len(back) // 2], 2), "most": round(back[-1], 2)},
        **told,
    }
    print(json.dumps(summary))
    return int(any(tally.wrong for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
