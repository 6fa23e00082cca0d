"""Bodies and paths made up from the API's description never break the server: no 5xx, no status it does not tell of.

The examples are few and always the same, so that a failure can be had again.
"""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, seed, settings
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine, fake_info

ENGINE, BACKEND = FakeEngine(info_value=fake_info(max_total_tokens=64, max_input_tokens=48)), Backend()
BACKEND.ready(ENGINE, ByteTokenizer(), ENGINE.info_value)
APP = create_app(BACKEND, ServerConfig())
CHECKS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


async def app_without_end(scope: Scope, receive: Receive, send: Send) -> None:
    """The app, which a lifespan per request would close after the first."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
    else:
        await APP(scope, receive, send)


schema = schemathesis.openapi.from_asgi("/api-doc/openapi.json", app_without_end)
schema.config.generation.update(modes=list(schemathesis.GenerationMode))


@pytest.fixture(scope="module", autouse=True)
def canary() -> Iterator[None]:
    """After all of it the server works as before, and nothing is held."""
    yield
    with TestClient(APP) as client:
        answer = client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 4}})
        assert answer.json() == {"generated_text": "bcde"}
        assert client.get("/health").status_code == 200
    assert APP.state.front.permits.taken == 0
    assert ENGINE.active == 0


@schema.parametrize()
@seed(7)
@settings(
    max_examples=6,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_nothing_breaks(case: schemathesis.Case):
    case.call_and_validate(checks=CHECKS)
