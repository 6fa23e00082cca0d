"""Engines replaced one after another behind one front, under streams of every kind: each must say what it says undisturbed.

    python -m tests.bench.rolling [--engines 3] [--rounds 2] [--model demo] [--drain 2] [--streams 2]

Each engine gets SIGTERM, has `--drain` seconds for its streams, must exit with 0, and is started again; the next one follows
when the front uses it. One JSON line last; exit code 1 if a stream was lost, or said anything else.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.bench.kills import tell, under_load
from tests.bench.shaken import arguments
from tests.support.whole_server import whole_server


class Engine:
    """An `xlane engine` on a Unix socket, started again and again."""

    def __init__(self, socket: Path, options: list[str]) -> None:
        self.address, self._socket = f"unix:{socket}", socket
        self._command = [sys.executable, "-m", "xlane.server", "engine", "--uds", str(socket), *options]
        self._log = socket.with_suffix(".log")
        self.start()

    def start(self) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
        }
        with self._log.open("a") as output:
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output, env=environment)

    def wait(self) -> None:
        """Return when it serves. Raises RuntimeError, with its log, if it has ended."""
        while not self._socket.exists():
            if self.process.poll() is not None:
                raise RuntimeError(self._log.read_text())
            time.sleep(0.2)

    def stop(self) -> int:
        """SIGTERM, and how it ended."""
        self.process.terminate()
        return self.process.wait(timeout=120)


class Rolling:
    """A `kills.Disturbance`: all engines are replaced, so many times."""

    def __init__(self, url: str, engines: list[Engine], rounds: int) -> None:
        self._url, self._engines, self._rounds = url, engines, rounds
        self.count = 0
        self.news = asyncio.Event()
        self.pointless = self._over = False
        self.codes: list[int] = []
        self.gone_s: list[float] = []
        """From SIGTERM to the end of the process."""
        self.replays = 0

    @property
    def done(self) -> bool:
        return self._over or self.pointless

    async def run(self) -> None:
        for engine in self._engines * self._rounds:
            await self.news.wait()
            began = time.monotonic()
            self.count += 1
            self.codes.append(await asyncio.to_thread(engine.stop))
            self.gone_s.append(time.monotonic() - began)
            engine.start()
            await asyncio.to_thread(engine.wait)
            while not self.done and await self._serving() < len(self._engines):
                await asyncio.sleep(0.2)
            if self.done:
                return
            self.news.clear()
        self._over = True

    async def _serving(self) -> int:
        """How many engines the front uses."""
        async with httpx.AsyncClient(timeout=30) as client:
            lines = (await client.get(f"{self._url}/metrics")).text.splitlines()
        told = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if not line.startswith("#")}
        self.replays = int(told["xlane_replays_total"])
        return int(told['xlane_engines{state="serving"}'])


@contextmanager
def engines_of(count: int, folder: Path, options: list[str]) -> Iterator[list[Engine]]:
    """So many engines, ended with the block."""
    engines: list[Engine] = []
    try:
        engines += (Engine(folder / f"{number}.sock", options) for number in range(count))
        for engine in engines:
            engine.wait()
        yield engines
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.wait()


def main() -> int:
    args = arguments(__doc__, engines=3, rounds=2, streams=2, drain=2.0)
    options = ["--model-id", args.model, "--kv-bytes", str(2**29), "--drain", str(args.drain)]
    with tempfile.TemporaryDirectory() as folder, engines_of(args.engines, Path(folder), options) as engines:
        addresses = ",".join(engine.address for engine in engines)
        front = ("--model-id", args.model, "--engine", addresses, "--limit", "template_timeout_s=600")
        with whole_server(Path(folder, "log"), *front) as served:
            rolling = Rolling(served.url, engines, args.rounds)
            tallies = asyncio.run(under_load(served.url, rolling, args.streams))
    told = tell(tallies)
    gone = sorted(rolling.gone_s)
    summary = {
        "replaced": rolling.count,
        "exit_codes": rolling.codes,
        "replays": rolling.replays,
        "gone_s": {"median": round(gone[len(gone) // 2], 2), "most": round(gone[-1], 2)},
        **told,
    }
    print(json.dumps(summary))
    return int(any(tally.wrong for tally in tallies.values()) or any(rolling.codes))


if __name__ == "__main__":
    sys.exit(main())
