"""uvicorn's HTTP/1 connection, with the bounds it lacks: bytes, lines and seconds of a request head.

Its fast parser takes heads of any size, and neither parser gives up on a client that sends half a head and waits; a
few hundred of those would hold every file descriptor.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .config import ServerConfig

_TEXTS = {
    400: "Bad Request",
    408: "Request Timeout",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
}


class _HeadRefused(Exception):
    """Stops the parser, which reports it as an error of its own; the connection is answered and closed by then."""


def bounded_protocol(config: ServerConfig) -> type[HttpToolsProtocol]:
    """The connection class with this configuration's bounds; uvicorn makes its instances itself."""

    class BoundedProtocol(HttpToolsProtocol):
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_complete()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = 0
            if self._deadline is None:
                self._expect_head()

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            if len(self.url) > config.header_limit // 2:
                self._refuse(414)

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            self._head_bytes += len(name) + len(value)
            if self._head_bytes > config.header_limit or len(self.headers) > config.header_count_limit:
                self._refuse(431)

        def on_headers_complete(self) -> None:
            self._head_complete()
            super().on_headers_complete()

        def _expect_head(self) -> None:
            self._deadline = self.loop.call_later(config.header_timeout_s, self._answer, 408)

        def _head_complete(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse(self, status: int) -> None:
            self._answer(status)
            raise _HeadRefused

        def _answer(self, status: int) -> None:
            self._head_complete()
            if self.transport.is_closing():
                return
            text = _TEXTS[status]
            head = f"HTTP/1.1 {status} {text}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()

        def send_400_response(self, msg: str) -> None:
            # After _HeadRefused there is nothing left to say.
            if not self.transport.is_closing():
                super().send_400_response(msg)

    return BoundedProtocol


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
        "timeout_graceful_shutdown": int(config.graceful_termination_timeout_s),
    }
