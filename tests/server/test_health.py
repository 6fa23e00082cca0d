"""What /health says of a server of several models: whether anything can be served, by whom it is asked for."""

import asyncio

import pytest
from starlette.testclient import TestClient

from xlane.engine import RequestFailed
from xlane.server import models
from xlane.server.app import create_app
from xlane.server.config import ServerConfig

from .test_models import made


def test_where_none_of_several_models_can_be_served_health_says_why(monkeypatch: pytest.MonkeyPatch):
    several, stands = made()
    app = create_app(stands["a"].backend, ServerConfig(), several)
    with TestClient(app) as client:

        async def lose(name: str) -> None:
            held = stands[name].held
            assert held is not None
            held.lost.set()
            await asyncio.sleep(0.01)

        def health() -> tuple[int, str]:
            answer = client.get("/health")
            return answer.status_code, answer.json()["error"] if answer.content else ""

        assert client.portal is not None
        client.portal.call(several.load)
        client.portal.call(lose, "a")
        status, why = health()
        assert status == client.get("/v2/health/ready").status_code == 503
        assert why.startswith("no model is loaded, and a cannot be: it died 5 times in a row")
        asked = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "model": "b"})
        assert (asked.status_code, health()) == (200, (200, "")), "another one is there"
        client.portal.call(lose, "b")
        assert "and b cannot be" in health()[1]
        monkeypatch.setattr(models, "FAILURE_S", 0.0)
        assert health() == (200, ""), "or none would be asked for, and tried again"
        client.portal.call(several.unload, 0.0)


def test_a_model_that_left_for_one_that_cannot_be_loaded_may_come_back():
    """Somebody who asks for the broken one takes no server out of its balancer's hands."""
    several, stands = made()
    stands["b"].fails = RequestFailed("its files are wrong")
    with TestClient(create_app(stands["a"].backend, ServerConfig(), several)) as client:
        assert client.portal is not None
        client.portal.call(several.load)
        asked = {"prompt": "a", "max_tokens": 1, "temperature": 0}
        assert client.post("/v1/completions", json={**asked, "model": "b"}).status_code == 503
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={**asked, "model": "a"}).status_code == 200
        client.portal.call(several.unload, 0.0)
