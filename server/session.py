"""One run of the server: HTTP at once, the model loaded behind it, an orderly end.

The port is open from the start and answers why it is not ready yet. The first SIGTERM or SIGINT refuses new requests and
lets the running ones end; a second one does not wait. Knows what belongs together and in which order; no HTTP, no jax.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.config import EngineConfig
from ..engine.errors import EngineError
from ..engine.request import EngineInfo
from .attached import AttachedModel
from .backend import Backend
from .config import ServerConfig
from .console import Console, bytes_text
from .flags import RunConfig
from .loaded import LoadedModel
from .options import UsageError
from .sockets import bind, port_of
from .tls import certificate_of

if TYPE_CHECKING:
    from .models import Loadable, Models

OK = 0
HEAD_START_S = 0.1
"""Time in which the engine of a model that is here is on its way."""


class Session:
    """Everything that lives from start to stop."""

    def __init__(
        self,
        engine: EngineConfig,
        server: ServerConfig,
        run: RunConfig,
        console: Console,
        command: Sequence[str] | None = None,
    ) -> None:
        """`command` runs the engine; default this program's own `engine` command for the model found."""
        self._server, self._console = server, console
        self._backend = Backend(run.hub_cache)
        self._models: Models | None = None
        if server.more_models:  # The engine of one that is alone shall not wait for what it does not need.
            from .several import several

            self._models = several(engine, server, run, self._backend, console, command)
        self._model: Loadable
        if self._models is not None:
            self._model = self._models
        elif run.engines:
            self._model = AttachedModel(engine, run, self._backend, console, server.tokenizer_config_path)
        else:
            self._model = LoadedModel(
                engine,
                run,
                self._backend,
                console,
                tokenizer_config_path=server.tokenizer_config_path,
                command=command,
            )
        self._began = time.perf_counter()
        # Asked now: when its terminal is closed, a signal's handler finds none any more.
        self._terminal = sys.stdin is not None and sys.stdin.isatty()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._listening = asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal. Raises EngineError and ModelError if the start fails or the engine is lost for good."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.hang_up)
        tls = certificate_of(self._server)
        try:
            sock = bind(self._server)
        except OSError as error:
            where = f"{self._server.host}:{self._server.port}"
            raise UsageError(
                f"cannot listen on {where}: {error.strerror}; choose --hostname and --port"
            ) from error
        self._url = _url(self._server.host, port_of(sock), secure=tls is not None)
        engine = asyncio.create_task(self._start_and_watch(), name="engine")
        await asyncio.wait({engine}, timeout=HEAD_START_S)
        # Slow to import: meanwhile the engine's process begins.
        from .app import create_app
        from .http import serve_http

        app = create_app(self._backend, self._server, self._models, tls)
        http = asyncio.create_task(
            serve_http(
                app,
                self._server,
                backend=self._models or self._backend,
                stop=self._stop,
                listening=self._listening,
                sock=sock,
                tls=tls,
            ),
            name="http",
        )
        try:
            await self._first_of(http, engine)
        except EngineError:
            # None comes after it: who waits for one is told so now, not when the time to drain is over.
            self._stop.set()
            await self._model.unload()
            raise
        finally:
            self._stop.set()
            await self._end(http)
        return OK

    def stop(self) -> None:
        """What a signal does: the first asks for an orderly end, the second for a quick one."""
        if self._stop.is_set():
            self._console.say("stopping now")
            self._hurry.set()
        else:
            self._console.settle()
            self._console.say("stopping: running requests may end, new ones are refused; again to stop now")
            self._stop.set()

    def hang_up(self) -> None:
        """What SIGHUP does: a terminal that is closed ends what was started in it; where there is none, somebody wants
        files read anew, which are whenever they change."""
        if self._terminal:
            self.stop()
        else:
            self._console.say("keys and certificates are read when they change; all else takes a restart")

    async def _first_of(self, http: asyncio.Task[None], engine: asyncio.Task[None]) -> None:
        """Until a signal, or until one of the two ends, which is an error."""
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({http, engine, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (engine, http):
                if task.done():
                    await task
        finally:
            for task in (engine, stopping):
                task.cancel()
            await asyncio.gather(engine, stopping, return_exceptions=True)

    async def _start_and_watch(self) -> None:
        """Load the model, say that the doors are open, and return never but by an error."""
        info = await self._model.load()
        await self._listening.wait()  # an engine that runs already may be quicker
        self._tell(info)
        await self._model.wait()

    def _tell(self, info: EngineInfo) -> None:
        self._console.table("serving", plan(info, self._server))
        if info.warning:
            self._console.say(info.warning, "WARNING")
        if self._models is not None:
            _, *others = self._models.all
            self._console.say(f"loaded when they are asked for: {', '.join(others)}")
        # Scripts made for TGI wait for this word.
        self._console.say(f"Connected: listening on {self._url}", fields={"url": self._url})
        name = self._server.served_model_name or info.model_id
        self._console.ready(self._url, time.perf_counter() - self._began, name, key=self._server.keyed)

    async def _end(self, http: asyncio.Task[None]) -> None:
        """First the requests, then the engine; a second signal cuts both short."""
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({http, hurry}, return_when=asyncio.FIRST_COMPLETED)
        http.cancel()
        await self._model.unload(hurry=self._hurry)
        hurry.cancel()
        await asyncio.gather(http, hurry, return_exceptions=True)


def plan(info: EngineInfo, server: ServerConfig) -> list[tuple[str, object]]:
    """What was decided, for people."""
    tokens = info.pages * info.page_tokens
    return [
        ("model", info.model_id + (f" at {info.model_sha[:12]}" if info.model_sha else "")),
        ("device", f"{info.device_count} x {info.device_kind} ({info.platform}), {info.precision}"),
        ("kernels", info.kernels),
        (
            "context",
            f"{info.max_total_tokens:,} tokens a request, at most {info.max_input_tokens:,} of prompt",
        ),
        ("lanes", f"{info.lanes} decode at once, {info.max_queued} may wait"),
        (
            "memory",
            f"weights {bytes_text(info.weights_bytes)}, KV cache {bytes_text(info.kv_bytes)}, temporaries "
            f"{bytes_text(info.temp_bytes)}, of {bytes_text(info.memory_bytes)}",
        ),
        (
            "KV cache",
            f"{tokens:,} tokens in pages of {info.page_tokens}, {_requests(tokens // info.max_total_tokens)} of full length",
        ),
        ("programs", len(info.programs)),
        ("API key", "asked for" if server.keyed else "none asked for"),
    ]


def _requests(count: int) -> str:
    return f"{count} request" + "s" * (count != 1)


def _url(host: str, port: int, *, secure: bool) -> str:
    """Where a browser on this machine finds it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if secure else 'http'}://{shown}:{port}"
