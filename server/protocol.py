"""uvicorn's HTTP/1 connection, with the bounds it lacks: how many there are, bytes, lines and seconds of a request.

Its fast parser takes heads of any size, and neither parser gives up on a client that sends half a request and waits; a
few hundred of those would hold every file descriptor. What is refused here is answered and the connection closed.
"""

import asyncio
import math
import resource
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .backend import CUT_S
from .config import ServerConfig
from .hosts import Hosts

OTHER_FILES = 64
"""File descriptors that are kept for everything but connections."""


class _Refused(Exception):
    """Stops the parser, which reports it as an error of its own; the connection is answered and closed by then."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. What it is bound to is the class's: uvicorn makes the instances itself."""

    bounds: ServerConfig
    most: int
    hosts: Hosts

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    """Ends a connection whose client reads nothing."""
    _head_bytes = 0
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._answer(503, f"There are {self.most} connections already {_limit('max_connections')}")
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self._read()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes, self._in_body = 0, False
        if self._deadline is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.bounds.url_limit:
            self._refuse(414, f"The URL has more than {self.bounds.url_limit} bytes {_limit('url_limit')}")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > self.bounds.header_limit:
            self._refuse(
                431, f"The headers have more than {self.bounds.header_limit} bytes {_limit('header_limit')}"
            )
        if len(self.headers) > self.bounds.header_count_limit:
            self._refuse(
                431,
                f"There are more than {self.bounds.header_count_limit} headers {_limit('header_count_limit')}",
            )

    def on_headers_complete(self) -> None:
        self._arrived()
        named = [value for name, value in self.headers if name == b"host"]
        if len(named) > 1:
            self._refuse(400, "There is more than one Host header")
        if named and (why := self.hosts.stranger(named[0])):
            self._refuse(403, why)
        super().on_headers_complete()
        self._in_body = True
        self._deadline = self.loop.call_later(self.bounds.body_timeout_s, self._late, "body")

    def on_message_complete(self) -> None:
        self._arrived()
        self._in_body = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not close(), which would wait for the client to read what is buffered.
        self._unread = self.loop.call_later(self.bounds.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(self.bounds.header_timeout_s, self._late, "header")

    def _late(self, part: str) -> None:
        limit_s: float = getattr(self.bounds, f"{part}_timeout_s")
        if self.flow.read_paused:  # It is not the client who waits, but we with reading.
            self._deadline = self.loop.call_later(limit_s, self._late, part)
            return
        self._answer(408, f"The {part} took longer than {limit_s:g} s {_limit(f'{part}_timeout_s')}")

    def _arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, message)
        raise _Refused

    def _answer(self, status: int, message: str) -> None:
        self._arrived()
        if self.transport.is_closing():
            return
        if self._may_answer():
            self.transport.write(refusal(status, message))
        self.transport.close()

    def _may_answer(self) -> bool:
        """Whether the request now read has no answer yet and no earlier one waits for its own."""
        if self._in_body:
            return not self.pipeline and not self.cycle.response_started
        return self.cycle is None or self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        # After _Refused there is nothing left to say.
        if not self.transport.is_closing():
            self._answer(400, msg)


def bounded_protocol(config: ServerConfig) -> type[BoundedProtocol]:
    """The connection class with this configuration's bounds."""

    class Bounded(BoundedProtocol):
        bounds = config
        most = most_connections(config)
        hosts = Hosts(config)

    return Bounded


def refusal(status: int, message: str) -> bytes:
    """A whole answer, in OpenAI's shape: what was asked for is not known, so neither is what its sender speaks."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    body = orjson.dumps({"error": error})
    again = b"retry-after: 1\r\n" if status == 503 else b""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-length: {len(body)}\r\n".encode()
    return head + again + b"content-type: application/json\r\nconnection: close\r\n\r\n" + body


def most_connections(config: ServerConfig) -> int:
    """Connections that are taken: as many as configured, if the process may have so many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return config.max_connections if files < 0 else min(config.max_connections, max(8, files - OTHER_FILES))


def _limit(name: str) -> str:
    return f"(--limit {name}=…)"


def uvicorn_options(config: ServerConfig) -> dict[str, Any]:
    """How uvicorn is set up for this configuration."""
    return {
        "http": bounded_protocol(config),
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": config.keep_alive_timeout_s,
        # Before that they are ended in order: this is for what even then does not go.
        "timeout_graceful_shutdown": math.ceil(config.graceful_termination_timeout_s + CUT_S),
    }
