"""The front over the fake engine, as an ASGI app and with its parts at hand."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.testclient import TestClient

from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine


@dataclass
class Rig:
    """A front and the engine behind it."""

    client: TestClient
    engine: FakeEngine
    backend: Backend

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body)

    def generate(self, inputs: str = "a", **parameters: Any) -> Any:
        return self.post("/generate", inputs=inputs, parameters={"max_new_tokens": 4, **parameters})

    def chat(self, content: str = "a", **fields: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", **{"messages": messages, "max_tokens": 4, **fields})

    def complete(self, prompt: Any = "a", **fields: Any) -> Any:
        return self.post("/v1/completions", prompt=prompt, **{"max_tokens": 4, "temperature": 0, **fields})


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def rig(config: ServerConfig, tokenizer: ByteTokenizer) -> Iterator[Rig]:
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, tokenizer, engine.info_value)
    with TestClient(create_app(backend, config), raise_server_exceptions=False) as client:
        yield Rig(client, engine, backend)
