"""One run of the server: HTTP at once, the model found, an engine process kept alive behind it, an orderly end.

The port is open from the start and answers why it is not ready yet. The first SIGTERM or SIGINT refuses new requests and
lets the running ones end; a second one does not wait. Knows what belongs together and in which order; no HTTP, no jax.
"""

import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..engine.client import EngineClient
from ..engine.config import EngineConfig
from ..engine.errors import EngineError
from ..engine.process import READY, ProcessEvent, Progress, Supervisor
from ..engine.replay import ReplayingClient
from ..engine.request import EngineInfo
from ..engine.rpc_client import RpcClient
from ..models.hub import ResolvedModel
from ..models.tokenizer import TextTokenizer
from .app import create_app
from .backend import Backend
from .config import ServerConfig
from .console import Console, bytes_text
from .flags import RunConfig, engine_arguments
from .http import bind, port_of, serve_http
from .model import find_model
from .options import UsageError
from .tls import tls_context

T = TypeVar("T")
OK = 0
ENGINE_STOP_S = 10.0
"""Time the engine has to end, after its requests have ended."""


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
        self._engine, self._server, self._run, self._console = engine, server, run, console
        self._command = command
        self._backend = Backend()
        self._began = time.perf_counter()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._supervisor: Supervisor | None = None
        self._client: EngineClient | None = None

    async def run(self) -> int:
        """Serve until a signal. Raises EngineError and ModelError if the start fails or the engine is lost for good."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        tls = tls_context(self._server)
        try:
            sock = bind(self._server)
        except OSError as error:
            where = f"{self._server.host}:{self._server.port}"
            raise UsageError(
                f"cannot listen on {where}: {error.strerror}; choose --hostname and --port"
            ) from error
        self._url = _url(self._server.host, port_of(sock), secure=tls is not None)
        app = create_app(self._backend, self._server)
        http = asyncio.create_task(
            serve_http(app, self._server, backend=self._backend, stop=self._stop, sock=sock, tls=tls),
            name="http",
        )
        try:
            await self._first_of(http, asyncio.create_task(self._start_and_watch(), name="engine"))
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
        """Find the model, start the engine, open the doors, and return never but by an error."""
        self._backend.say("looking for the model")
        model = await _detached(self._find)
        tokenizer = asyncio.create_task(
            asyncio.to_thread(
                TextTokenizer.from_path, model.path, _kind(model), self._server.tokenizer_config_path
            )
        )
        self._supervisor = Supervisor(
            self._command or engine_command(self._engine, model, self._run),
            socket=None if self._run.uds_path is None else Path(self._run.uds_path),
            on_progress=self._on_progress,
            on_event=self._on_event,
            on_stderr=lambda line: self._console.line(line.rstrip("\n")),
        )
        try:
            self._backend.say("the engine starts")
            # Together, so that a tokenizer that cannot be read is told of before the weights are loaded.
            _, text = await asyncio.gather(self._supervisor.start(), tokenizer)
            self._client = client = ReplayingClient(RpcClient(self._supervisor.address))
            self._open(client, text, await client.info())
        finally:
            tokenizer.cancel()
        await self._supervisor.wait()

    def _find(self) -> ResolvedModel:
        def progress(done: int, total: int) -> None:
            self._backend.say(f"downloading the model, {done / 1e6:.0f} of {total / 1e6:.0f} MB")
            self._console.progress("download", done, total, "B")

        return find_model(self._engine, self._run.hub_cache, progress)

    def _open(self, client: EngineClient, tokenizer: TextTokenizer, info: EngineInfo) -> None:
        self._backend.ready(client, tokenizer, info)
        asyncio.get_running_loop().run_in_executor(None, tokenizer.warm)
        self._console.settle()
        self._console.table("serving", plan(info, self._server))
        if info.warning:
            self._console.say(info.warning, "WARNING")
        # Scripts made for TGI wait for this word.
        self._console.say(f"Connected: listening on {self._url}", fields={"url": self._url})
        name = self._server.served_model_name or info.model_id
        self._console.ready(self._url, time.perf_counter() - self._began, name, key=self._server.keyed)

    def _on_progress(self, progress: Progress) -> None:
        if progress.phase == READY:
            return
        share = f" {100 * progress.done / progress.total:.0f} %" if progress.total else ""
        self._backend.say(f"{progress.phase}{share}")
        if progress.total:
            unit = "B" if progress.phase == "weights" else ""
            self._console.progress(progress.phase, progress.done, progress.total, unit)

    def _on_event(self, event: ProcessEvent) -> None:
        if event.kind == "died":
            self._console.settle()
            self._console.say(f"the engine (process {event.pid}) died: {event.detail}", "ERROR")
        elif event.kind == "ready" and self._client is not None:
            self._backend.restarts += 1
            self._console.say("the engine is back; interrupted requests go on")

    async def _end(self, http: asyncio.Task[None]) -> None:
        """First the requests, then the engine; a second signal cuts both short."""
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({http, hurry}, return_when=asyncio.FIRST_COMPLETED)
        http.cancel()
        if self._supervisor is not None:
            stopping = asyncio.create_task(self._supervisor.stop(0.5 if hurry.done() else ENGINE_STOP_S))
            await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                await self._supervisor.stop(0.5)
            await stopping
        if self._client is not None:
            with contextlib.suppress(EngineError):
                await self._client.close()
        hurry.cancel()
        await asyncio.gather(http, hurry, return_exceptions=True)


async def _detached(work: Callable[[], T]) -> T:
    """The result of slow work in a thread that nobody waits for at the end: a stop must not wait for a download."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def tell(method: Callable[[Any], None], value: Any) -> None:
        if not result.done():
            method(value)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # The loop is gone: so is whoever asked.
            try:
                loop.call_soon_threadsafe(tell, result.set_result, work())
            except Exception as error:
                loop.call_soon_threadsafe(tell, result.set_exception, error)

    threading.Thread(target=run, name="find-model", daemon=True).start()
    return await result


def engine_command(config: EngineConfig, model: ResolvedModel, run: RunConfig) -> list[str]:
    """How the engine of this server is started. `-P`: a folder named xlane where we stand must not be imported."""
    found = [f"--model-path={model.path}"]
    if model.sha is not None:
        found.append(f"--model-sha={model.sha}")
    if run.json_output:
        found.append("--json-output")
    command = [sys.executable, "-P", "-m", "xlane.server", "engine"]
    return [*command, *engine_arguments(config), *found, f"--log-level={run.log_level}"]


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
        ("KV cache", f"{tokens:,} tokens, {tokens // info.max_total_tokens} requests of full length"),
        ("programs", len(info.programs)),
        ("API key", "asked for" if server.keyed else "none asked for"),
    ]


def _kind(model: ResolvedModel) -> Literal["directory", "gguf"]:
    return "gguf" if model.kind == "gguf" else "directory"


def _url(host: str, port: int, *, secure: bool) -> str:
    """Where a browser on this machine finds it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if secure else 'http'}://{shown}:{port}"
