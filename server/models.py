"""Several models on one port: which are loaded, who waits for one, who makes room for another. Knows no HTTP, no processes.

So many are loaded at once as fit by plan: each engine gets its share of the memory. A model is loaded when it is first asked
for; for that the one that was not asked for the longest leaves, but only while nobody uses it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..engine import EngineError, EngineInfo
from .backend import Backend, Serving
from .errors import Busy, NoSuchModel, NotReady
from .loaded import ENGINE_STOP_S
from .validate_openai import ANY_MODEL

logger = logging.getLogger(__name__)

State = Literal["not loaded", "loading", "loaded", "failed"]
FAILURE_S = 60.0
"""How long a model that could not be loaded is not tried again."""
COME_BACK_S = 5.0
"""When to ask again for a model that is loading."""


class Loadable(Protocol):
    """What `loaded.LoadedModel` is."""

    async def load(self) -> EngineInfo: ...

    async def wait(self) -> None: ...

    async def unload(self, timeout_s: float = ENGINE_STOP_S, hurry: asyncio.Event | None = None) -> None: ...


@dataclass(slots=True, eq=False)
class ServedModel:
    """One of them."""

    name: str
    """As requests ask for it."""
    backend: Backend
    make: Callable[[], Loadable]
    state: State = "not loaded"
    requests: int = 0
    """That use it, or wait for it."""
    used_at: float = 0.0
    """When the last request came, by the monotonic clock."""
    failure: str = ""
    failed_at: float = 0.0
    held: Loadable | None = None
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """`load` while it is being loaded, `watch` while it is."""


class Models:
    """All of them. Used from one event loop."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        most_loaded: int,
        most_waiting: int,
        wait_s: float,
        tell: Callable[[str], None] = logger.info,
    ) -> None:
        """
        Args:
            models: the first is loaded at the start, and asked by whoever names none.
            most_loaded: models in memory at once.
            most_waiting: requests that wait for one model; more are refused at once.
            wait_s: how long a request waits for its model.
            tell: told who comes and who goes.
        """
        self.all = {model.name: model for model in models}
        self._first = models[0]
        self._most, self._most_waiting = most_loaded, most_waiting
        self._wait_s, self._tell = wait_s, tell
        self._turn = asyncio.Lock()
        self._idle = asyncio.Event()
        self._draining = False

    def find(self, name: str | None) -> ServedModel:
        """The model that a request asks for. Raises NoSuchModel."""
        if name is None or name in ANY_MODEL:
            return self._first
        if name not in self.all:
            known = ", ".join(repr(known) for known in self.all)
            raise NoSuchModel(
                f"The model {name[:200]!r} does not exist; this server has {known}", param="model"
            )
        return self.all[name]

    async def enter(self, name: str | None) -> ServedModel:
        """The model of this name, loaded, which stays so until `release`. Raises NoSuchModel, NotReady, Busy."""
        model = self.find(name)
        if model.state != "loaded" and model.requests >= self._most_waiting:
            raise Busy(f"{model.requests} requests wait for the model {model.name!r} already", COME_BACK_S)
        model.requests += 1
        try:
            await self._loaded(model)
        except BaseException:
            self.release(model)
            raise
        model.used_at = time.monotonic()
        return model

    def release(self, model: ServedModel) -> None:
        """A request that entered is done."""
        model.requests -= 1
        if not model.requests:
            self._idle.set()

    async def load(self) -> EngineInfo:
        """Load the first. Raises EngineError, ModelError; `unload` must be called in any case."""
        async with self._turn:
            return await self._start(self._first)

    async def wait(self) -> None:
        """Never returns: a model that is lost is no end of the others."""
        await asyncio.Event().wait()

    async def unload(self, timeout_s: float = ENGINE_STOP_S, hurry: asyncio.Event | None = None) -> None:
        """End all engines, each within so many seconds."""
        tasks = [task for model in self.all.values() for task in model.tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        held = [model.held for model in self.all.values() if model.held is not None]
        await asyncio.gather(*(each.unload(timeout_s, hurry) for each in held))

    @property
    def latest(self) -> Serving | None:
        """What is there of one that is loaded."""
        return next((m.backend.latest for m in self.all.values() if m.backend.latest is not None), None)

    def leave(self) -> None:
        """From now on /health says that no requests are wanted, while they are still served."""
        for model in self.all.values():
            model.backend.leave()

    def drain(self) -> None:
        """From now on new requests are refused for good; running ones end normally."""
        self._draining = True
        for model in self.all.values():
            model.backend.drain()

    async def cut(self) -> None:
        """End what still runs."""
        await asyncio.gather(*(model.backend.cut() for model in self.all.values()))

    async def _loaded(self, model: ServedModel) -> None:
        if model.state == "loaded" or self._draining:
            return  # who drains is told so by the backend
        left_s = model.failed_at + FAILURE_S - time.monotonic()
        if model.state == "failed" and left_s > 0:
            raise self._failed(model, left_s)
        if "load" not in model.tasks:
            model.state = "loading"
            model.backend.say("waits for its turn to be loaded")
            model.tasks["load"] = asyncio.create_task(self._bring(model))
        try:
            async with asyncio.timeout(self._wait_s):
                await asyncio.shield(model.tasks["load"])
        except TimeoutError:
            why = f"The model {model.name!r} is not loaded yet: {model.backend.reason}"
            raise NotReady(why, COME_BACK_S) from None
        if model.state == "failed":
            raise self._failed(model, FAILURE_S)

    def _failed(self, model: ServedModel, left_s: float) -> NotReady:
        return NotReady(f"The model {model.name!r} cannot be loaded: {model.failure}", left_s)

    async def _bring(self, model: ServedModel) -> None:
        """Load a model when it is its turn and there is room. What goes wrong is noted in it."""
        try:
            async with self._turn:
                await self._make_room(model)
                with contextlib.suppress(Exception):
                    await self._start(model)
        finally:
            del model.tasks["load"]

    async def _make_room(self, model: ServedModel) -> None:
        while True:
            self._idle.clear()
            there = [other for other in self.all.values() if other.state == "loaded"]
            if len(there) < self._most:
                return
            if idle := [other for other in there if not other.requests]:
                await self._evict(min(idle, key=lambda other: other.used_at))
            else:
                model.backend.say("waits until another model is idle")
                await self._idle.wait()

    async def _evict(self, model: ServedModel) -> None:
        assert model.held is not None, "it is loaded"
        self._tell(f"model {model.name} leaves the memory")
        model.tasks.pop("watch").cancel()
        model.state, held = "not loaded", model.held
        model.backend.down("not loaded", comes_back=True)
        await held.unload()
        model.held = None

    async def _start(self, model: ServedModel) -> EngineInfo:
        """Raises what loading raises, noted as the model's failure."""
        model.state = "loading"
        model.held = held = model.make()
        began = time.monotonic()
        try:
            info = await held.load()
        except Exception as error:
            await self._lose(model, error)
            raise
        model.state, model.used_at = "loaded", time.monotonic()
        model.tasks["watch"] = asyncio.create_task(self._watch(model, held))
        self._tell(f"model {model.name} is loaded, in {model.used_at - began:.1f} s")
        return info

    async def _watch(self, model: ServedModel, held: Loadable) -> None:
        try:
            await held.wait()
        except EngineError as error:
            del model.tasks["watch"]
            await self._lose(model, error)

    async def _lose(self, model: ServedModel, error: Exception) -> None:
        """A model that could not be loaded, or whose engine is lost for good, is told of and given up for a while."""
        model.state, model.failure, model.failed_at = "failed", str(error), time.monotonic()
        model.backend.down(model.failure, comes_back=True)
        self._tell(f"model {model.name} cannot be served: {error}")
        held, model.held = model.held, None
        if held is not None:
            await held.unload(0.0)
        self._idle.set()
