"""One model whose engines run elsewhere: its tokenizer is read here, the engines are found and looked at; fills a `Backend`.

Knows in which order, and whom to tell how far it is. The engines are not ours: nothing here starts or ends one.
"""

import asyncio
import contextlib
from dataclasses import replace

from ..engine.config import EngineConfig
from ..engine.errors import EngineError
from ..engine.fleet import Fleet
from ..engine.replay import ReplayingClient
from ..engine.replicas import Replicas
from ..engine.request import EngineInfo
from ..models.tokenizer import TextTokenizer
from .backend import Backend
from .console import Console
from .flags import RunConfig
from .loaded import ENGINE_STOP_S, LEAST_PATIENCE_S, detached, kind_of
from .model import find_model


class AttachedModel:
    """A model between start and stop of this front. Used from one event loop."""

    def __init__(
        self,
        engine: EngineConfig,
        run: RunConfig,
        backend: Backend,
        console: Console,
        tokenizer_config_path: str | None = None,
    ) -> None:
        """
        Args:
            engine: which model; how it is run is for its engines to say.
            run: where it is kept, and where its engines are.
            backend: told what is waited for, and given all that requests need once an engine is there.
            console: shown the same.
            tokenizer_config_path: a chat template that goes before the model's own.
        """
        self._engine, self._run, self._backend, self._console = engine, run, backend, console
        self._tokenizer_config_path = tokenizer_config_path
        self._fleet: Fleet | None = None
        self._client: ReplayingClient | None = None

    async def load(self) -> EngineInfo:
        """Return when requests are served. Raises ModelError; `unload` must be called in any case."""
        self._backend.say("looking for the model")
        # What describes it is enough: the engines have its weights.
        described = replace(self._engine, load_format="dummy")
        model = await detached(lambda: find_model(described, self._run.hub_cache))
        text = await asyncio.to_thread(
            TextTokenizer.from_path, model.path, kind_of(model), self._tokenizer_config_path
        )
        waited = f"no engine serves at {', '.join(self._run.engines)}"
        self._backend.say(waited)
        self._console.say(f"waits while {waited}")
        self._fleet = Fleet(self._run.engines, self._engine.model_id, on_change=self._on_change)
        self._client = client = ReplayingClient(Replicas(self._fleet), recovery_timeout_s=LEAST_PATIENCE_S)
        await self._fleet.start()
        info = await client.info()
        self._backend.ready(client, text, info)
        asyncio.get_running_loop().run_in_executor(None, text.warm)
        return info

    async def wait(self) -> None:
        """Never returns: engines that are away may come again."""
        await asyncio.Event().wait()

    async def unload(self, timeout_s: float = ENGINE_STOP_S, hurry: asyncio.Event | None = None) -> None:
        """Leave the engines, at once whatever the time: they go on for others."""
        if self._client is not None:
            with contextlib.suppress(EngineError):
                await self._client.close()

    def _on_change(self) -> None:
        assert self._fleet is not None, "it tells of its changes"
        self._backend.engines = self._fleet.states
        if (info := self._fleet.info) is not None:
            self._backend.update(info)
