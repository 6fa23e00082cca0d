"""Servers that the client tests run against: the front over an engine of hand arithmetic, and the whole product."""

from collections.abc import Iterator

import httpx
import pytest

from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine, fake_info
from ..support.live_server import live_server
from ..support.whole_server import Served, whole_server


@pytest.fixture(scope="session")
def fake_server_url() -> Iterator[str]:
    """The real front over the engine that says the alphabet."""
    engine, backend = FakeEngine(fake_info(20_000, 16_000), obeys=True), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, ServerConfig(cors_allow_origins=("*",))) as server:
        yield server.url


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`xlane serve`, as the README says it, with the demo model."""
    with whole_server(tmp_path_factory.mktemp("demo") / "log", "--cors-allow-origin", "*") as served:
        yield served


@pytest.fixture(scope="session", params=["fake_server_url", "demo"])
def server_url(request: pytest.FixtureRequest) -> str:
    """Base URL of the server under test."""
    server = request.getfixturevalue(request.param)
    return server if isinstance(server, str) else server.url


@pytest.fixture(scope="session")
def model(server_url: str) -> str:
    """The served model's name, found as clients find it."""
    return httpx.get(f"{server_url}/v1/models").json()["data"][0]["id"]
