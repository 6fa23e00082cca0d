"""What is no proper HTTP, on raw sockets, while other streams go on: it is answered and cut off, and nobody else notices.

The numbers are those of the checklist that test_bad_input.py follows, too.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from xlane.server import protocol
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.canaries import Canaries, canaries, eventually
from ..support.fake_engine import FakeEngine
from ..support.live_server import live_server

CONFIG = ServerConfig(header_timeout_s=0.4, body_timeout_s=0.4, max_connections=300, payload_limit=50_000)
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def birds() -> Iterator[Canaries]:
    engine, backend = FakeEngine(delay_s=0.002), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, CONFIG) as server, canaries(server) as birds:
        yield birds
    assert engine.active == 0


def connected(birds: Canaries, wait_s: float = 5.0) -> socket.socket:
    host, port = birds.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=wait_s)


def answer_to(birds: Canaries, *parts: bytes, pause_s: float = 0.0, shut: bool = False) -> bytes:
    """All the server says until it closes the connection."""
    with connected(birds) as sock:
        with suppress(ConnectionError):
            for part in parts:
                sock.sendall(part)
                time.sleep(pause_s)
            if shut:
                sock.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):  # Of what it was sent, some was not read.
            while part := sock.recv(65536):
                received += part
        return received


CHUNKED = POST + b"transfer-encoding: chunked\r\n"
HELLO = bytes.fromhex("16030100c8010000c40303") + b"\0" * 190

ROWS: list[tuple[int, bytes, int, bytes]] = [
    (4, POST + b"content-length: 50001\r\n\r\n", 413, b"larger than 50000 bytes"),
    (4, POST + b"content-length: 99999999999999999999999\r\n\r\n", 400, b""),
    (4, CHUNKED + b"\r\n" + (b"2710\r\n" + b" " * 10_000 + b"\r\n") * 9, 413, b"larger than 50000 bytes"),
    (5, GET + b"x: " + b"y" * 1_000_000 + b"\r\n\r\n", 431, b"--limit header_limit="),
    (5, GET + b"".join(b"x%d: y\r\n" % i for i in range(20_000)) + b"\r\n", 431, b"--limit header_count_limit="),
    (5, b"GET /" + b"y" * 64_000 + b" HTTP/1.1\r\n\r\n", 414, b"--limit url_limit="),
    (6, CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n", 400, b""),
    (6, POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, b""),
    (6, POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcde", 400, b""),
    (6, POST + b"content-length: -5\r\n\r\n", 400, b""),
    (6, POST + b"content-length: 5, 5\r\n\r\n", 400, b""),
    (6, POST + b"transfer-encoding: chunked, identity\r\n\r\n", 400, b""),
    (6, CHUNKED + b"\r\nzz\r\n", 400, b""),
    (6, CHUNKED + b"\r\nffffffffffffffffff\r\n", 400, b""),
    (6, CHUNKED + b"\r\n-1\r\n", 400, b""),
    (6, CHUNKED + b"\r\n3\r\nabcdef\r\n0\r\n\r\n", 400, b""),
    (6, GET + b"x: a\r\n folded: b\r\n\r\n", 400, b""),
    (6, GET + b"x y: a\r\n\r\n", 400, b""),
    (6, GET + b"x : a\r\n\r\n", 400, b""),
    (6, GET + b"x: a\0b\r\n\r\n", 400, b""),
    (6, GET + b"host: localhost\r\n\r\n", 400, b"more than one Host"),
    (6, b"GET /\0 HTTP/1.1\r\nhost: localhost\r\n\r\n", 400, b""),
    (7, GET + b"x-slow: ", 408, b"--limit header_timeout_s="),
    (7, b"", 408, b"--limit header_timeout_s="),
    (7, POST + b"content-length: 9\r\n\r\n{", 408, b"--limit body_timeout_s="),
    (7, CHUNKED + b"\r\n1\r\n", 408, b"--limit body_timeout_s="),
    (8, b"GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n", 403, b"evil.example"),
    (8, b"GET /health HTTP/1.1\r\nhost: x/../\r\n\r\n", 403, b"--insecure"),
    (34, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, b""),
    (34, HELLO, 400, b""),
    (34, b"\x00\x01\x02\x03" * 100, 400, b""),
    (34, b"GET / HTTP/9.9\r\n\r\n", 400, b""),
    (34, b"SSH-2.0-OpenSSH_9.0\r\n", 400, b""),
]  # fmt: skip
"""Number in the checklist, what is sent, status, what the answer says."""


@pytest.mark.parametrize(("row"), ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])
def test_what_is_no_http_is_answered_once_and_cut_off(birds: Canaries, row: tuple[int, bytes, int, bytes]):
    _, sent, status, words = row
    answer = answer_to(birds, sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"connection: close" in head.lower()
    assert answer.count(b"HTTP/1.1") == 1
    assert words in body
    assert birds.wrong == []


@pytest.mark.parametrize("head", [b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\n",
                                  b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: eA==\r\n"])  # fmt: skip
def test_no_other_protocol_is_spoken(birds: Canaries, head: bytes):
    answer = answer_to(birds, GET + head + b"connection: close\r\n\r\n", shut=True)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"101" not in answer.split(b"\r\n")[0]


def test_a_body_at_a_byte_a_time_is_given_up(birds: Canaries):
    began = time.monotonic()
    answer = answer_to(birds, POST + b"content-length: 90\r\n\r\n", *[b"{"] * 20, pause_s=0.05)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 5
    birds.check()


def test_a_body_that_nobody_waits_for_any_more_ends_the_connection(birds: Canaries):
    with connected(birds) as sock:
        sock.sendall(b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999999\r\n\r\n")
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 4")
    assert answer.count(b"HTTP/1.1") == 1, "a second answer would be taken for the next request's"


def test_requests_that_come_together_are_answered_in_their_order(birds: Canaries):
    ask = b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    answer = answer_to(birds, ask + GET + b"\r\n" + ask + GET + b"bad header\r\n\r\n")
    # What is wrong with the fourth is known before the others are answered, so it may cut them off; never mixes them.
    assert answer.count(b"HTTP/1.1 200 ") <= 3
    assert (
        answer_to(birds, ask + GET + b"\r\n" + ask + GET + b"connection: close\r\n\r\n").count(b" 200 ") == 4
    )


def test_a_client_that_says_no_more_is_gone(birds: Canaries):
    body = b'{"prompt": "a", "max_tokens": 400}'
    assert answer_to(birds, POST + b"content-length: %d\r\n\r\n" % len(body) + body, shut=True) == b""


@pytest.mark.parametrize(
    "target", [b"/v1//models", b"//v1/models", b"/v1/models/", b"http://evil.example/v1/models"]
)
def test_other_spellings_of_a_path_are_that_path(birds: Canaries, target: bytes):
    answer = answer_to(birds, b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" % target)
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    assert b"fake/alphabet" in answer


def test_a_path_cannot_climb(birds: Canaries):
    answer = answer_to(birds, b"GET /v1/../metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    "host", ["localhost:1", "127.0.0.1", "[::1]:80", "box.local", "a.localhost", "LOCALHOST."]
)
def test_this_machines_names_are_taken(birds: Canaries, host: str):
    assert httpx.get(f"{birds.url}/health", headers={"host": host}).status_code == 200


def test_a_page_of_another_site_cannot_ask(birds: Canaries):
    # What a browser sends without asking first, and what it asks first.
    simple = httpx.post(
        f"{birds.url}/generate", content=b'{"inputs": "a"}', headers={"content-type": "text/plain"}
    )
    assert simple.status_code == 415
    asked = httpx.options(
        f"{birds.url}/generate",
        headers={"origin": "http://evil.example", "access-control-request-method": "POST"},
    )
    for answer in (simple, asked):
        assert [name for name in answer.headers if name.startswith("access-control")] == []


def test_a_thousand_half_requests_do_not_keep_others_out(birds: Canaries):
    with ExitStack() as held:
        for _ in range(250):
            held.enter_context(connected(birds)).sendall(GET)
        birds.check()
        assert httpx.get(f"{birds.url}/health").status_code == 200
        for _ in range(60):
            with suppress(OSError):
                held.enter_context(connected(birds))
        full = answer_to(birds)
        assert full.startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 408 "))
        if b" 503 " in full:
            assert b"retry-after: 1" in full
            assert b"--limit max_connections=" in full
        # Their time runs out, and there is room again while they are still there.
        eventually(lambda: httpx.get(f"{birds.url}/health").status_code == 200, "others are let in again")
    birds.check()


def test_a_flood_of_requests_is_told_when_to_come_again():
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 400, "temperature": 0, "stream": True}
    engine, backend = FakeEngine(delay_s=0.002), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, ServerConfig(max_concurrent_requests=8)) as server, ExitStack() as held:
        client = held.enter_context(httpx.Client(base_url=server.url))
        answers = [held.enter_context(client.stream("POST", "/v1/completions", json=body)) for _ in range(12)]
        assert [answer.status_code for answer in answers] == [200] * 8 + [429] * 4
        for answer in answers[8:]:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["x-should-retry"] == "true"
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_no_more_connections_than_files(monkeypatch: pytest.MonkeyPatch):
    for files, most in ((64, 8), (1024, 960), (-1, 4096), (1 << 20, 4096)):
        monkeypatch.setattr(protocol.resource, "getrlimit", lambda _, files=files: (files, files))
        assert protocol.most_connections(ServerConfig()) == most
