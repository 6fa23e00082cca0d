"""What goes wrong around a server that is well: readers that stand still, scrapers in crowds, one request's own failure.

Other streams go on meanwhile, as they are, to the byte. What becomes of engines that die is in test_session.py and
tests/engine/test_replay.py; of clients that leave, in test_live.py.
"""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import httpx
import pytest

from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteStream, ByteTokenizer
from ..support.canaries import Canaries, canaries, eventually
from ..support.fake_engine import FakeEngine
from ..support.live_server import live_server

STALLED = 8


class Tokenizer(ByteTokenizer):
    """Breaks at the third token after a prompt that ends with "!"."""

    def stream(self, prompt_ids: Sequence[int] = ()) -> ByteStream:
        return Breaking() if prompt_ids and prompt_ids[-1] == ord("!") else ByteStream()


class Breaking(ByteStream):
    def __init__(self) -> None:
        super().__init__()
        self._left = 2

    def push(self, token_id: int) -> str:
        if not self._left:
            raise IndexError("secret: a table of this server's own")
        self._left -= 1
        return super().push(token_id)


ENGINE = FakeEngine(delay_s=0.002)


@pytest.fixture(scope="module")
def birds() -> Iterator[Canaries]:
    backend = Backend()
    backend.ready(ENGINE, Tokenizer(), ENGINE.info_value)
    config = ServerConfig(write_timeout_s=0.5)
    with live_server(backend, config, send_buffer_bytes=4096) as server, canaries(server) as birds:
        yield birds
    assert ENGINE.active == 0


def test_readers_that_stand_still_are_cut_off_and_hold_up_nobody(birds: Canaries):
    body = json.dumps(
        {"prompt": "a", "max_tokens": 400, "logprobs": 5, "stream": True, "temperature": 0, "n": 2}
    )
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    host, port = birds.url.removeprefix("http://").split(":")
    submitted = len(ENGINE.submitted)
    with ExitStack() as held:
        for _ in range(STALLED):
            sock = held.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        eventually(lambda: stalled(submitted) == 2 * STALLED, "they run")
        birds.check()
        eventually(lambda: stalled(submitted) == 0, "they are cut off though their sockets are open")
    birds.check()


def stalled(since: int) -> int:
    """Sequences of theirs that run: submitted, and not cancelled."""
    theirs = {request.id for request in ENGINE.submitted[since:] if request.sampling.max_tokens == 400}
    return len(theirs - set(ENGINE.cancelled))


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_with_one_text_is_that_requests_alone(birds: Canaries, stream: bool):
    body = {"prompt": "!", "max_tokens": 9, "temperature": 0, "stream": stream}
    answer = httpx.post(f"{birds.url}/v1/completions", json=body)
    assert answer.status_code == (200 if stream else 500)
    assert "secret" not in answer.text
    told = answer.text.split("\n\n")[-3].removeprefix("data: ") if stream else answer.text
    assert json.loads(told)["error"]["message"] == "Internal server error"
    birds.check()


def test_a_crowd_of_scrapers_costs_nobody_a_byte(birds: Canaries):
    def scrape() -> None:
        with httpx.Client() as client:
            for _ in range(10):
                codes.append(client.get(f"{birds.url}/metrics").status_code)

    codes: list[int] = []
    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    birds.check()
    for thread in threads:
        thread.join()
    assert codes == [200] * 80
