"""What only shows on a real socket: clients that leave, keep-alive comments, half-sent heads, a graceful end."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.sockets import bind

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine
from ..support.live_server import LiveServer, live_server

CONFIG = ServerConfig(
    sse_keep_alive_s=0.15, header_timeout_s=0.3, graceful_termination_timeout_s=5, payload_limit=100_000
)


@dataclass
class Live:
    """A running server and the engine behind it."""

    server: LiveServer
    engine: FakeEngine

    @property
    def url(self) -> str:
        return self.server.url


@pytest.fixture
def live() -> Iterator[Live]:
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, CONFIG) as server:
        yield Live(server, engine)


def eventually(holds: Callable[[], bool], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a"}),
    ("/generate_stream", {"inputs": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True, "n": 2}),
    ("/v1/completions", {"prompt": "a", "stream": True}),
    ("/v1/responses", {"input": "a", "stream": True}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 99}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 99, "stream": True}),
]


def leave_early(url: str, body: dict[str, Any]) -> None:
    """Ask, and close the connection after the first bytes of the answer, or after 0.3 s without any."""
    try:
        with httpx.Client(timeout=0.3) as client, client.stream("POST", url, json=body) as response:
            next(response.iter_raw())
    except httpx.TimeoutException:
        pass


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("first_delay_s", [0.0, 30.0])
def test_a_client_that_leaves_frees_its_lanes(
    live: Live, path: str, body: dict[str, Any], first_delay_s: float
):
    live.engine.first_delay_s = first_delay_s
    live.engine.delay_s = 0.02
    for _ in range(20):  # on a busy machine the client may be gone before its request has begun
        leave_early(live.url + path, body)
        if live.engine.submitted:
            break
    eventually(lambda: live.engine.active == 0)
    assert len(live.engine.cancelled) == len(live.engine.submitted) == body.get("n", 1)
    metrics = httpx.get(live.url + "/metrics").text
    assert 'tgi_request_failure{err="dropped"} 1.0' in metrics


def test_silence_is_broken_by_comments(live: Live):
    live.engine.first_delay_s = 0.5
    with httpx.stream("POST", live.url + "/generate_stream", json={"inputs": "a"}) as response:
        text = "".join(response.iter_text())
    assert text.startswith(":\n\n:\n\n")
    assert '"generated_text":"bcd' in text


def test_an_error_after_a_comment_is_an_event(live: Live):
    live.engine.first_delay_s = 0.3
    live.engine.fail_with, live.engine.fail_after = RuntimeError("secret"), 0
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    response = httpx.post(live.url + "/v1/chat/completions", json=body)
    assert response.status_code == 200
    *_, error, done, _end = response.text.split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "Internal server error"


def test_the_end_waits_for_running_requests_and_takes_no_new_ones(live: Live):
    live.engine.delay_s = 0.03
    answers: list[httpx.Response] = []
    body = {"inputs": "a", "parameters": {"max_new_tokens": 20}}
    asking = threading.Thread(target=lambda: answers.append(httpx.post(live.url + "/generate", json=body)))
    asking.start()
    eventually(lambda: live.engine.active == 1)
    live.server.stop()
    asking.join()
    assert answers[0].json()["generated_text"] == "bcdefghijklmnopqrstu"
    live.server.thread.join(5)
    assert not live.server.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(live.url + "/health")


def test_before_the_end_balancers_see_it_while_requests_are_still_served():
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    body = {"inputs": "a", "parameters": {"max_new_tokens": 2}}
    with live_server(backend, replace(CONFIG, drain_delay_s=3.0)) as server, httpx.Client() as client:

        def refused() -> bool:
            try:
                return client.post(server.url + "/generate", json=body).status_code == 503
            except httpx.TransportError:  # later still, nobody is there to say so
                return True

        asked = time.monotonic()
        server.stop()
        eventually(lambda: client.get(server.url + "/health").status_code == 503)
        assert client.post(server.url + "/generate", json=body).json()["generated_text"] == "bc"
        assert "xlane_ready 0.0" in client.get(server.url + "/metrics").text
        eventually(refused)
        assert time.monotonic() - asked >= 3.0


def raw(live: Live, data: bytes, wait_s: float = 3.0) -> bytes:
    """What the server answers to these bytes before it closes."""
    with socket.create_connection(("127.0.0.1", live.server.port), timeout=wait_s) as sock:
        sock.sendall(data)
        received = b""
        while part := sock.recv(65536):
            received += part
        return received


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ", b"408"),
        (b"", b"408"),
        (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
    ],
)
def test_heads_that_are_refused(live: Live, head: bytes, status: bytes):
    answer = raw(live, head)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:100]
    assert answer.count(b"HTTP/1.1") == 1


def test_a_slow_head_does_not_hinder_others_and_an_idle_connection_is_kept(live: Live):
    with httpx.Client(base_url=live.url) as client:
        assert client.get("/health").status_code == 200
        time.sleep(0.5)
        assert client.get("/health").status_code == 200


def test_a_busy_port_is_known_before_anything_is_started(live: Live):
    with pytest.raises(OSError, match="in use"):
        bind(ServerConfig(port=live.server.port))
