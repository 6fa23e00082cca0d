"""Mixed traffic for a long time, with clients that leave or stand still, bad requests and killed engines: what is held at the
end is what was held before.

    python -m tests.bench.soak [--minutes 10] [--model demo] [--clients 12] [--kill-every SECONDS, on average: 60]

A fifth of the time warms up; then all ends, and what server and engine hold is noted. After the rest of the time all ends again,
and it is noted again. Engines are killed all along but for the last third, so that the one looked at has served a while, and so
has the one looked at first. Every whole stream must say what it says undisturbed. A table and one JSON line last; exit code 1 if
more is held, or a request ended otherwise than it must.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from tests.bench.shaken import arguments, shaken_server
from tests.support.traffic import KINDS, Heard, Kind, events, heard
from tests.support.whole_server import Served

WARM_UP, LAST_QUIET = 0.2, 0.35
"""Shares of the time: before the first look, and without kills before each."""
QUIET_S = 90.0
"""Longest that all is given to end."""
BAD: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": "a", "temperature": -1}),
    ("/v1/completions", {"prompt": [], "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 10**9}),
    ("/v1/chat/completions", [1, 2]),
    ("/generate", {"inputs": "a", "parameters": {"temperature": -1}}),
    ("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "("}}}),
    ("/nowhere", {}),
]
LONG = "The river flows past the town and on to the sea. " * 120


class Traffic:
    """Clients that do one thing after another, drawn at random."""

    def __init__(self, served: Served, client: httpx.AsyncClient, undisturbed: dict[str, Heard]) -> None:
        self._served, self._client, self._undisturbed = served, client, undisturbed
        self.done: Counter[str] = Counter()
        self.news = asyncio.Event()
        """An engine has made a token for somebody."""
        self.wrong: list[str] = []
        self._acts = [self.stream] * 4 + [
            self.whole, self.long_prompt, self.leave, self.leave, self.leave_early, self.bad, self.bad, self.stall,
        ]  # fmt: skip

    async def go_on(self, seed: int, until: float) -> None:
        """One client's life."""
        chance = random.Random(seed)
        while time.monotonic() < until:
            act = chance.choice(self._acts)
            try:
                await act(chance)
            except (AssertionError, httpx.HTTPError, OSError) as error:
                self.wrong.append(f"{act.__name__}: {error!r:.400}")
                await asyncio.sleep(1)
            self.done[act.__name__] += 1

    def _any(self, chance: random.Random) -> tuple[str, Kind]:
        return chance.choice(list(KINDS.items()))

    async def stream(self, chance: random.Random) -> None:
        name, kind = self._any(chance)
        now = await heard(self._client, kind, self.news.set)
        assert now.like(self._undisturbed[name]), (name, now, self._undisturbed[name])

    async def whole(self, chance: random.Random) -> None:
        _, kind = self._any(chance)
        body = {name: value for name, value in kind.body.items() if not name.startswith("stream")}
        answer = await self._client.post(kind.path.removesuffix("_stream"), json=body)
        self.news.set()
        assert answer.status_code == 200, answer.text

    async def long_prompt(self, chance: random.Random) -> None:
        body = {"prompt": f"{chance.random()} {LONG}", "max_tokens": 4}
        answer = await self._client.post("/v1/completions", json=body)
        self.news.set()
        assert answer.status_code == 200, answer.text

    async def leave(self, chance: random.Random) -> None:
        _, kind = self._any(chance)
        left = chance.randrange(1, 30)
        async for _ in events(self._client, kind):
            self.news.set()
            if not (left := left - 1):
                break

    async def leave_early(self, chance: random.Random) -> None:
        _, kind = self._any(chance)
        asking = asyncio.create_task(heard(self._client, kind))
        await asyncio.sleep(chance.random() / 4)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async def bad(self, chance: random.Random) -> None:
        path, body = chance.choice(BAD)
        answer = await self._client.post(path, json=body)
        assert 400 <= answer.status_code < 500, (answer.status_code, path, answer.text)

    async def stall(self, chance: random.Random) -> None:
        """Read the beginning of a long stream, then nothing, until the server has had enough."""
        port = int(self._served.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = json.dumps({"prompt": "a", "max_tokens": 200, "logprobs": 5, "n": 2, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.read(100)
        await asyncio.sleep(chance.uniform(2, 10))
        writer.transport.abort()


async def kill_often(served: Served, every_s: float, until: float, traffic: Traffic) -> None:
    """`kill -9` of the engine at random moments, about so long after it was there again, and after somebody had a token from
    it: a request that twice loses an engine in which nothing else runs is rightly taken for the killer."""
    chance = random.Random(1)
    while time.monotonic() + every_s < until:
        while not await asyncio.to_thread(served.healthy):
            await asyncio.sleep(0.2)
        traffic.news.clear()
        await asyncio.sleep(chance.uniform(0.5, 1.5) * every_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await traffic.news.wait()
        if (pid := served.engine_pid()) is not None and time.monotonic() < until:
            os.kill(pid, signal.SIGKILL)
            traffic.done["kill"] += 1


def process_holds(pid: int) -> dict[str, float]:
    """Of one process: MB of its own memory, threads, open files."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "memory_mb": round(int(status["RssAnon"].split()[0]) / 1024, 1),
        "threads": int(status["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


async def holds(served: Served) -> dict[str, float]:
    """What server and engine hold when nothing is asked of them, and the bounds that is compared by."""
    until = time.monotonic() + QUIET_S
    while True:
        async with httpx.AsyncClient(timeout=QUIET_S) as client:
            lines = (
                await client.get(f"{served.url}/metrics", headers={"connection": "close"})
            ).text.splitlines()
        told = {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}
        if time.monotonic() > until or not told["xlane_requests_in_flight"] + told["xlane_lanes_active"]:
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(8)  # connections that are kept alive end, threads go to rest
    os.kill(served.process.pid, signal.SIGUSR1)
    await asyncio.sleep(1)
    tasks = [line for line in served.log.read_text().splitlines() if line.startswith("tasks ")]
    engine = served.engine_pid()
    assert engine is not None
    return {
        "requests in flight": told["xlane_requests_in_flight"],
        "lanes taken": told["xlane_lanes_active"],
        "pages taken": told["xlane_pages_total"] - told["xlane_pages_free"],
        "tasks": int(tasks[-1].split()[1]),
        **{f"server {name}": value for name, value in process_holds(served.process.pid).items()},
        **{f"engine {name}": value for name, value in process_holds(engine).items()},
    }


def allowed(name: str, before: float) -> float:
    """How much may be held at the end. Memory is what an allocator keeps, so it need not be the same to the page; pools of threads grow
    to what was needed at once; a library opens a file of its own when it first needs it. What leaks does so with each of the
    hundreds of requests."""
    if name.endswith("memory_mb"):
        return before * 1.1 + 10
    more = {"threads": 16, "files": 4}
    return before + more.get(name.split()[-1], 0)


async def soak(
    served: Served, minutes: float, clients: int, kill_every_s: float
) -> tuple[Traffic, dict[str, float], dict[str, float]]:
    """The traffic's doings, and what was held after the warm-up and at the end."""
    timeout = httpx.Timeout(600)
    async with httpx.AsyncClient(
        base_url=served.url, timeout=timeout, limits=httpx.Limits(keepalive_expiry=2)
    ) as client:
        undisturbed = {name: await heard(client, kind) for name, kind in KINDS.items()}
        traffic, looks = Traffic(served, client, undisturbed), []
        for number, share in enumerate((WARM_UP, 1 - WARM_UP)):
            took_s = 60 * minutes * share
            until = time.monotonic() + took_s
            await asyncio.gather(
                kill_often(served, kill_every_s, until - LAST_QUIET * took_s, traffic),
                *(traffic.go_on(100 * number + n, until) for n in range(clients)),
            )
            looks.append(await holds(served))
    return traffic, looks[0], looks[1]


def main() -> int:
    args = arguments(__doc__, minutes=10.0, clients=12, kill_every=60.0)
    options = ("--limit", "write_timeout_s=5", "--limit", "keep_alive_timeout_s=5")
    with shaken_server(args.model, *options, module="tests.support.telling_server") as served:
        traffic, before, after = asyncio.run(soak(served, args.minutes, args.clients, args.kill_every))
    more = [name for name in before if after[name] > allowed(name, before[name])]
    print(f"{'':>20}  after warm-up   at the end")
    for name, value in before.items():
        print(f"{name:>20}  {value:13g}  {after[name]:11g}{'  MORE' if name in more else ''}")
    print(", ".join(f"{count} {name}" for name, count in sorted(traffic.done.items())))
    for wrong in traffic.wrong:
        print("wrong:", wrong)
    said = {
        "minutes": args.minutes,
        "done": traffic.done,
        "before": before,
        "after": after,
        "wrong": len(traffic.wrong),
    }
    print(json.dumps(said))
    return int(bool(more or traffic.wrong))


if __name__ == "__main__":
    sys.exit(main())
