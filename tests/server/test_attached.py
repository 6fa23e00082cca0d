"""A front whose engines run elsewhere: `--engine`, from the command line to the end of a stream."""

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from xlane.engine.rpc_server import RpcServer
from xlane.server import cli, doctor
from xlane.server.flags import RunConfig

from ..support.canaries import eventually
from ..support.fake_core import FakeCore
from ..support.fake_session import fake_model
from .test_session import PATIENCE_S, RunningServer


class Elsewhere:
    """Engines that are not the front's, in this process: each comes and goes when told."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.cores: dict[str, FakeCore] = {}
        self._servers: dict[str, RpcServer] = {}

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def come(self, address: str, **says: Any) -> FakeCore:
        core = self.cores[address] = FakeCore(turn_s=0.01, **says)
        server = self._servers[address] = RpcServer(core, address)
        self._do(server.start())
        return core

    def go(self, address: str) -> None:
        """As an engine does at SIGTERM whose time to drain is over at once."""
        self.cores[address].drain(0)
        self.cores.pop(address).stop()
        self._do(self._servers.pop(address).stop())

    def close(self) -> None:
        for address in [*self.cores]:
            self.go(address)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(fake_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    engines = Elsewhere()
    yield engines
    engines.close()


@pytest.fixture
def addresses(tmp_path: Path) -> list[str]:
    return [f"unix:{tmp_path}/{name}.sock" for name in "ab"]


@pytest.fixture
def server(model: str, addresses: list[str]) -> Iterator[RunningServer]:
    running = RunningServer(
        [
            sys.executable,
            "-m",
            "xlane.server",
            "serve",
            model,
            "--engine",
            ",".join(addresses),
            "--json-output",
        ]
        + ["--port=0", "--limit=write_timeout_s=60"]
    )
    yield running
    running.process.kill()
    running.process.wait()


def states(server: RunningServer) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.split('"')[1]: float(line.split()[1]) for line in lines if line.startswith("xlane_engines{")}


def test_engines_come_and_go_and_the_front_stays(
    server: RunningServer, elsewhere: Elsewhere, addresses: list[str], model: str
):
    one, other = addresses
    server.until("waits while no engine serves at")
    elsewhere.come(one, model_id=model)
    server.ready()
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert states(server) == {"serving": 1, "draining": 0, "away": 1, "refused": 0}
    whole = server.stream(60)

    elsewhere.come(other, model_id=model, lanes=2)
    eventually(lambda: states(server)["serving"] == 2, "both serve")
    assert httpx.get(f"{server.url}/info").json()["max_batch_size"] == 10
    assert httpx.get(f"{server.url}/ui/lanes").json()["lanes_total"] == 10

    def go(number: int) -> None:
        if number == 10:
            elsewhere.go(next(a for a in addresses if elsewhere.cores[a].stats().lanes_active))

    assert server.stream(60, go) == whole
    (left,) = elsewhere.cores
    eventually(
        lambda: states(server) == {"serving": 1, "draining": 0, "away": 1, "refused": 0}, "one has gone"
    )

    with ThreadPoolExecutor(1) as pool:
        # Nobody is left: a request waits, /health says no, and both are well with the next engine.
        elsewhere.go(left)
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503, "nobody is left")
        waiting = pool.submit(server.stream, 60)
        elsewhere.come(left, model_id=model)
        assert waiting.result(PATIENCE_S) == whole
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_S) == 0
    assert elsewhere.cores[left].healthy()


def test_a_dry_run_and_the_doctor_ask_the_engines(
    elsewhere: Elsewhere, addresses: list[str], model: str, capsys: pytest.CaptureFixture[str]
):
    one, other = addresses
    run, line = (
        RunConfig(engines=(one, other)),
        ["serve", model, "--dry-run", "--engine", ",".join(addresses)],
    )
    found = doctor.engines(run, model)
    assert (found.status, "xlane engine" in found.do) == ("fail", True)
    elsewhere.come(one, model_id=model)
    elsewhere.come(other, model_id="another")
    assert cli.run(line, {}) == 0
    rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    assert f"{one} serving" in rows
    assert f"{other} refused: it serves another, and this front {model}" in rows
    assert "lanes 8" in rows
    assert doctor.engines(run, model).status == "warn"
    assert doctor.engines(RunConfig(engines=(one,)), model).status == "ok"
