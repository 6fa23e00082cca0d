"""One request over HTTP/1.1, with the moment each piece of the answer arrived. Written to cost little.

The load generator shares the machine with the server it measures, so this knows just enough of HTTP and server-sent
events: one connection a request, a C parser, and no JSON but in the last event. Knows nothing of load or statistics.
"""

import asyncio
import json
import re
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

HAS_TEXT = re.compile(rb'"(?:text|content|reasoning_content)":\s*"[^"]')
"""An event that brings its reader something: not one of a role, a usage or an end alone. Quotes inside a JSON text are escaped,
so no text can look like a field."""


@dataclass(slots=True)
class Answer:
    """What one request got."""

    sent_at: float
    """Clock of `time.perf_counter`, as all moments here."""
    done_at: float = 0.0
    status: int = 0
    moments: list[float] = field(default_factory=list)
    """When each event with text arrived."""
    last_event: bytes = b""
    """TGI's has the details, OpenAI's the usage, llama.cpp's the timings."""
    wanted_tokens: int = 0
    """How many were asked for; for whoever sent the request to fill in."""
    body: bytearray = field(default_factory=bytearray)
    """What came, if it was no event stream."""
    headers: dict[str, str] = field(default_factory=dict)
    """By names in lower case."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server."""

    host: str
    port: int
    path: str
    """Prefix of all paths."""
    tls: bool
    headers: str
    """Lines sent with each request."""

    @classmethod
    def parse(cls, url: str, api_key: str | None) -> "Endpoint":
        """From a URL. Raises ValueError."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no http URL")
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        # Clients of OpenAI are given its URL with the version; each path here has its own.
        return cls(parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"), tls, key)

    def request(self, path: str, body: Any = None) -> bytes:
        """The bytes of one request; no body is a GET."""
        payload = b"" if body is None else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        head = (
            f"{method} {self.path}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{self.headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + payload


class _Exchange(asyncio.Protocol):
    """One connection, one request, one answer. Method names are asyncio's and httptools'."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self._request, self._done = request, done
        self._parser = httptools.HttpResponseParser(self)
        self._events = False
        self._failed = ""
        self._rest = b""
        self._now = 0.0
        self._transport: asyncio.BaseTransport | None = None
        self.answer = Answer(time.perf_counter())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        # uvloop's transports are of no asyncio class, so this cannot be asked for.
        cast(asyncio.WriteTransport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"connection lost: {exc}" if exc else "connection closed before the answer was complete")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        if name.lower() == b"content-type":
            self._events = b"event-stream" in value

    def on_body(self, body: bytes) -> None:
        if not self._events:
            self.answer.body += body
            return
        *events, self._rest = (self._rest + body).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            self._event(event)

    def _event(self, event: bytes) -> None:
        for line in event.split(b"\n"):
            kind, _, data = line.partition(b":")
            data = data.strip()
            # llama.cpp has had `error:` in the place of `data:`.
            if kind == b"error" or data.startswith(b'{"error"'):
                self._failed = f"error event: {data[:200].decode(errors='replace')}"
            elif kind == b"data" and data not in (b"", b"[DONE]"):
                if HAS_TEXT.search(data):
                    self.answer.moments.append(self._now)
                self.answer.last_event = data

    def on_message_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()
        self._end(self._failed)

    def _end(self, error: str) -> None:
        if not self._done.done():
            self.answer.error = error
            self.answer.done_at = time.perf_counter()
            self._done.set_result(None)
        self.close()

    def close(self) -> None:
        """Give the connection back, whatever state it is in."""
        if self._transport is not None:
            self._transport.close()


async def exchange(endpoint: Endpoint, request: bytes, timeout_s: float) -> Answer:
    """Send and receive. Failures are in `Answer.error`."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    protocol = _Exchange(request, done)
    context = ssl.create_default_context() if endpoint.tls else None
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(lambda: protocol, endpoint.host, endpoint.port, ssl=context)
            await done
    except TimeoutError:
        protocol.answer.error = f"no complete answer in {timeout_s:g} s"
    except OSError as error:
        protocol.answer.error = f"cannot connect: {error.strerror or error}"
    finally:
        protocol.close()
    answer = protocol.answer
    if not answer.error and answer.status != 200:
        answer.error = f"HTTP {answer.status}: {bytes(answer.body[:200]).decode(errors='replace')}"
    return answer


async def call(endpoint: Endpoint, path: str, body: Any = None) -> Any:
    """A plain JSON call. Raises ConnectionError with what went wrong."""
    answer = await exchange(endpoint, endpoint.request(path, body), 60.0)
    if answer.error:
        raise ConnectionError(answer.error)
    return json.loads(bytes(answer.body))
