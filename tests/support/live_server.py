"""A real server on a free port of this machine, in a thread, over any app. For clients that need a socket."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import uvloop

from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.http import serve_http
from xlane.server.models import Models
from xlane.server.sockets import bind, port_of
from xlane.server.tls import certificate_of

START_TIMEOUT_S = 20.0


@dataclass
class LiveServer:
    """A running server; `stop` begins its graceful end, leaving the `with` block waits for it."""

    url: str
    port: int
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop
    stop_event: asyncio.Event

    def stop(self) -> None:
        if self.thread.is_alive():
            with suppress(RuntimeError):  # its loop may end just now
                self.loop.call_soon_threadsafe(self.stop_event.set)


@contextmanager
def live_server(
    backend: Backend,
    config: ServerConfig | None = None,
    *,
    send_buffer_bytes: int | None = None,
    models: Models | None = None,
) -> Iterator[LiveServer]:
    """Serve a backend, or several models of which it is the first one's, until the block ends. `send_buffer_bytes`: the
    kernel's, of each connection."""
    config = replace(config or ServerConfig(), port=0)
    tls = certificate_of(config)
    sock = bind(config)
    if send_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    up = threading.Event()
    started: list[LiveServer] = []

    async def main() -> None:
        stop, listening = asyncio.Event(), asyncio.Event()
        port = port_of(sock)
        scheme = "http" if tls is None else "https"
        started.append(
            LiveServer(f"{scheme}://127.0.0.1:{port}", port, thread, asyncio.get_running_loop(), stop)
        )
        app = create_app(backend, config, models, tls)
        if models is not None:
            await models.load()
        serving = asyncio.create_task(
            serve_http(
                app, config, backend=models or backend, stop=stop, listening=listening, sock=sock, tls=tls
            )
        )
        await listening.wait()
        up.set()
        await serving

    thread = threading.Thread(target=lambda: uvloop.run(main()), daemon=True)
    thread.start()
    if not up.wait(START_TIMEOUT_S):
        raise TimeoutError("the server did not start")
    try:
        yield started[0]
    finally:
        started[0].stop()
        thread.join(START_TIMEOUT_S)
