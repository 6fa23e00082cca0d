"""Serving the app over HTTP until told to stop. Knows sockets and uvicorn; signals and processes are the caller's.

Run it in a uvloop event loop (`uvloop.run`); any other works too, slower.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from .backend import Serving
from .config import ServerConfig
from .protocol import uvicorn_options
from .sockets import bind
from .tls import Certificate

BACKLOG = 2048


class Drainable(Protocol):
    """What answers the requests: a `Backend`, or several."""

    @property
    def latest(self) -> Serving | None: ...

    def leave(self) -> None: ...

    def drain(self) -> None: ...

    async def cut(self) -> None: ...


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: whoever runs several things in a process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


async def serve_http(
    app: ASGIApp,
    config: ServerConfig,
    *,
    backend: Drainable,
    stop: asyncio.Event,
    listening: asyncio.Event | None = None,
    sock: socket.socket | None = None,
    tls: Certificate | None = None,
) -> None:
    """Serve until `stop` is set; then refuse new requests, let the running ones end, and return.

    For `drain_delay_s` before that requests are served as ever, but /health says no: whoever sends them here has that time to see
    it. Running requests have `graceful_termination_timeout_s`, after which they end with an error that says so.

    Args:
        app: what `create_app` made.
        config: the same as the app's.
        backend: marked as draining at the stop, so that /health says so to the last prober.
        stop: set by the caller, from a signal handler for instance.
        listening: set as soon as connections are taken.
        sock: from `bind`; made here if absent.
        tls: from `certificate_of`, for HTTPS; kept up to date here.
    """
    sock = sock or bind(config)
    settings = uvicorn.Config(app, backlog=BACKLOG, **uvicorn_options(config))
    settings.load()
    settings.ssl = None if tls is None else tls.context
    server = _Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(_started(server, listening))
    renewing = [asyncio.create_task(tls.renew())] if tls is not None else []
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if config.drain_delay_s and backend.latest is not None:
            backend.leave()
            await asyncio.wait({serving}, timeout=config.drain_delay_s)
        backend.drain()
        server.should_exit = True
        if not (await asyncio.wait({serving}, timeout=config.graceful_termination_timeout_s))[0]:
            await backend.cut()
        await serving
    finally:
        tasks = (stopping, starting, serving, *renewing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _started(server: uvicorn.Server, listening: asyncio.Event | None) -> None:
    # uvicorn has no event for it. It is a matter of milliseconds, once.
    while not server.started:
        await asyncio.sleep(0.005)
    if listening is not None:
        listening.set()
