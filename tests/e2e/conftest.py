"""Servers that the client tests run against. A test takes `server_url` and must pass on any of them."""

from collections.abc import Iterator

import pytest
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine
from ..support.live_server import live_server


@pytest.fixture(scope="session")
def fake_server_url() -> Iterator[str]:
    """The real front over the engine that says the alphabet."""
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, ServerConfig(cors_allow_origins=("*",))) as server:
        yield server.url


@pytest.fixture(scope="session")
def server_url(fake_server_url: str) -> str:
    """Base URL of the server under test."""
    return fake_server_url
