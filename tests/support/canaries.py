"""Streams that go on while something is done to a server, and must not notice; and what a server holds before and after."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from .live_server import LiveServer

COMPLETION = {"prompt": "the same", "max_tokens": 12, "stream": True}
CANARIES: list[dict[str, Any]] = [
    {**COMPLETION, "temperature": 0},
    {**COMPLETION, "seed": 3},
    {**COMPLETION, "seed": 8, "top_p": 0.9, "logprobs": 2, "n": 2},
]
"""One greedy, one sampled, one with all the trimmings."""


def eventually(holds: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    """Wait until it holds; fail if it does not in time."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"it did not happen in time: {what}"
        time.sleep(0.01)


def said(url: str, body: dict[str, Any], client: httpx.Client) -> tuple[str, ...]:
    """A stream's events in the order of each choice, without what tells one request from another."""
    lines = client.post(f"{url}/v1/completions", json=body).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert lines[-2:] == ["data: [DONE]", ""], lines
    told = [json.dumps({**event, "id": "", "created": 0}) for event in events]
    return tuple(sorted(told, key=lambda text: json.loads(text)["choices"][0]["index"]))


@dataclass
class Canaries:
    """Each stream is asked for again and again, in a thread of its own."""

    url: str
    first: list[tuple[str, ...]]
    """What each said undisturbed."""
    wrong: list[Any] = field(default_factory=list)
    rounds: list[int] = field(default_factory=lambda: [0] * len(CANARIES))
    stopping: threading.Event = field(default_factory=threading.Event)

    def sing(self, number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while not self.stopping.is_set() and not self.wrong:
                try:
                    now = said(self.url, CANARIES[number], client)
                    if now != self.first[number]:
                        self.wrong.append((number, now))
                    self.rounds[number] += 1
                except Exception as error:
                    self.wrong.append((number, error))

    def check(self) -> None:
        """All is as it was, and goes on: each has said its text anew since this was called."""
        before = list(self.rounds)
        eventually(
            lambda: (
                bool(self.wrong) or all(now > then for now, then in zip(self.rounds, before, strict=True))
            ),
            "a stream stands still",
        )
        assert self.wrong == []
        assert httpx.get(f"{self.url}/health").status_code == 200


def held(server: LiveServer) -> dict[str, int]:
    """What a server in this process holds now."""

    async def tasks() -> int:
        return len(asyncio.all_tasks()) - 1

    count = asyncio.run_coroutine_threadsafe(tasks(), server.loop).result(10)
    with httpx.Client() as client:
        lines = client.get(f"{server.url}/metrics", headers={"connection": "close"}).text.splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}
    return {
        "tasks": count,
        "files": len(os.listdir("/proc/self/fd")),
        "lanes": int(values["tgi_batch_current_size"]),
        "in flight": int(values["xlane_requests_in_flight"]),
    }


@contextmanager
def canaries(server: LiveServer) -> Iterator[Canaries]:
    """Streams for as long as the block; what the server holds at its end is no more than at its beginning."""
    with httpx.Client() as client:
        first = [said(server.url, body, client) for body in CANARIES]
    before = held(server)
    watch = Canaries(server.url, first)
    threads = [threading.Thread(target=watch.sing, args=[n], daemon=True) for n in range(len(CANARIES))]
    for thread in threads:
        thread.start()
    try:
        yield watch
    finally:
        watch.stopping.set()
        for thread in threads:
            thread.join(60)
    assert watch.wrong == []
    now: dict[str, int] = {}

    def returned() -> bool:
        now.update(held(server))
        return all(now[name] <= before[name] for name in before)

    eventually(returned, f"{before} is held again, now {now}")
