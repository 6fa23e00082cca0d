"""Servers that the client tests run against: the front over an engine of hand arithmetic, and the whole product."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine, fake_info
from ..support.live_server import live_server

READY_S = 240
"""A first start compiles, and the machine may be busy."""


@pytest.fixture(scope="session")
def fake_server_url() -> Iterator[str]:
    """The real front over the engine that says the alphabet."""
    engine, backend = FakeEngine(fake_info(20_000, 16_000), obeys=True), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, ServerConfig(cors_allow_origins=("*",))) as server:
        yield server.url


@dataclass(frozen=True)
class Served:
    """A running `xlane serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def engine_pid(self) -> int:
        """The process id of its engine child."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return next(int(pid) for path in children for pid in path.read_text().split())


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`xlane serve`, as the README says it, with the demo model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "xlane.server", "serve", "--port", str(port), "--cors-allow-origin", "*"],
            stdout=output, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
    served = Served(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_ready(served)
        yield served
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()


def _wait_ready(served: Served) -> None:
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        assert served.process.poll() is None, served.log.read_text()
        try:
            if httpx.get(f"{served.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(served.log.read_text())


@pytest.fixture(scope="session", params=["fake_server_url", "demo"])
def server_url(request: pytest.FixtureRequest) -> str:
    """Base URL of the server under test."""
    server = request.getfixturevalue(request.param)
    return server if isinstance(server, str) else server.url


@pytest.fixture(scope="session")
def model(server_url: str) -> str:
    """The served model's name, found as clients find it."""
    return httpx.get(f"{server_url}/v1/models").json()["data"][0]["id"]
