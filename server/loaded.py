"""One model made ready to answer: found, its tokenizer read, its engine process kept alive; fills a `Backend`.

Knows in which order, and whom to tell how far it is; not who asks the model, nor whether there are others.
"""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..engine.config import EngineConfig
from ..engine.errors import EngineError
from ..engine.process import READY, ProcessEvent, Progress, Supervisor
from ..engine.replay import ReplayingClient
from ..engine.request import EngineInfo
from ..engine.rpc_client import RpcClient
from ..models.hub import ResolvedModel
from ..models.tokenizer import TextTokenizer
from .backend import Backend
from .console import Console
from .flags import RunConfig, engine_arguments
from .model import find_model, with_adapters

T = TypeVar("T")
ENGINE_STOP_S = 10.0
"""Time an engine has to end, after its requests have."""
LEAST_PATIENCE_S = 120.0
"""Time that streams wait for an engine to come back, or three times what the first one took: that of a large model takes
minutes."""


class LoadedModel:
    """A model between its start and its stop. Used from one event loop, whose thread must outlive the engine."""

    def __init__(
        self,
        engine: EngineConfig,
        run: RunConfig,
        backend: Backend,
        console: Console,
        *,
        tokenizer_config_path: str | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            engine: which model, and how it is run.
            run: where it is kept, its socket, how it logs.
            backend: told what is waited for, and given all that requests need once it is there.
            console: shown the same, and what the engine says.
            tokenizer_config_path: a chat template that goes before the model's own.
            command: runs the engine; default this program's own `engine` command for the model found.
        """
        self._engine, self._run, self._backend, self._console = engine, run, backend, console
        self._tokenizer_config_path = tokenizer_config_path
        self._command = command
        self._supervisor: Supervisor | None = None
        self._client: ReplayingClient | None = None
        self._watching: asyncio.Task[None] | None = None

    async def load(self) -> EngineInfo:
        """Return when requests are served. Raises EngineError, ModelError; `unload` must be called in any case."""
        self._backend.say("looking for the model")
        model = await detached(self._find)
        self._engine = await detached(lambda: with_adapters(self._engine, self._run.hub_cache))
        self._supervisor = Supervisor(
            self._command or engine_command(self._engine, model, self._run),
            socket=None if self._run.uds_path is None else Path(self._run.uds_path),
            on_progress=self._on_progress,
            on_event=self._on_event,
            on_stderr=lambda line: self._console.pass_on(line.rstrip("\n")),
        )
        began = time.monotonic()
        starting = asyncio.create_task(self._supervisor.start())  # first: it takes longest
        tokenizer = asyncio.create_task(
            asyncio.to_thread(
                TextTokenizer.from_path, model.path, kind_of(model), self._tokenizer_config_path
            )
        )
        try:
            self._backend.say("the engine starts")
            # Together, so that a tokenizer that cannot be read is told of before the weights are loaded.
            _, text = await asyncio.gather(starting, tokenizer)
            patience_s = max(LEAST_PATIENCE_S, 3 * (time.monotonic() - began))
            engine = RpcClient(self._supervisor.address)
            self._client = client = ReplayingClient(engine, recovery_timeout_s=patience_s)
            info = await client.info()
            self._watching = asyncio.create_task(self._supervisor.watch(engine.serving))
        finally:
            tokenizer.cancel()
        self._backend.ready(client, text, info)
        asyncio.get_running_loop().run_in_executor(None, text.warm)
        self._console.settle()
        return info

    async def wait(self) -> None:
        """Return after `unload`. Raises EngineLost if the engine has died too often to be started again."""
        assert self._supervisor is not None, "loaded before"
        await self._supervisor.wait()

    async def unload(self, timeout_s: float = ENGINE_STOP_S, hurry: asyncio.Event | None = None) -> None:
        """End the engine, which has so many seconds for it, or half a one from the moment that `hurry` is set."""
        if self._client is not None:
            self._client.leave()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._supervisor is not None:
            hurry = hurry or asyncio.Event()
            stopping = asyncio.create_task(self._supervisor.stop(0.5 if hurry.is_set() else timeout_s))
            hurried = asyncio.create_task(hurry.wait())
            await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                await self._supervisor.stop(0.5)
            await stopping
            hurried.cancel()
        if self._client is not None:
            with contextlib.suppress(EngineError):
                await self._client.close()

    def _find(self) -> ResolvedModel:
        def progress(done: int, total: int) -> None:
            self._backend.say(f"downloading the model, {done / 1e6:.0f} of {total / 1e6:.0f} MB")
            self._console.progress("download", done, total, "B")

        return find_model(self._engine, self._run.hub_cache, progress)

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


async def detached(work: Callable[[], T]) -> T:
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
    """How the engine of this model is started. `-P`: a folder named xlane where we stand must not be imported."""
    found = [f"--model-path={model.path}"]
    if model.sha is not None:
        found.append(f"--model-sha={model.sha}")
    if run.json_output:
        found.append("--json-output")
    command = [sys.executable, "-P", "-m", "xlane.server", "engine"]
    return [*command, *engine_arguments(config), *found, f"--log-level={run.log_level}"]


def kind_of(model: ResolvedModel) -> Literal["directory", "gguf"]:
    return "gguf" if model.kind == "gguf" else "directory"
