"""Several models on one port: which are loaded, who waits for one, who makes room for another. Knows no HTTP, no processes.

So many are loaded at once as fit by plan: each engine gets its share of the memory. A model is loaded when it is first asked
for; for that the one that was not asked for the longest leaves, once nobody uses it. If all stay in use, the one that is there
the longest has had its turn at some time: from then on its new requests wait for its return, and it leaves after the last of
those that run. So a model under constant load makes every other one wait for a while, and none for ever.
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

State = Literal["not loaded", "loading", "loaded", "leaving", "failed"]
UNASKED = "it is loaded when it is asked for"
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
    running: int = 0
    """Requests that use it."""
    waiting: int = 0
    """Requests that wait for it."""
    used_at: float = 0.0
    """When the last request came, by the monotonic clock, as all times here."""
    asked_at: float = 0.0
    """When it was asked for while it was not there."""
    loaded_at: float = 0.0
    failure: str = ""
    failed_at: float = 0.0
    held: Loadable | None = None
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """`load` while it is being loaded, `watch` while it is."""

    @property
    def why(self) -> str:
        """Why requests wait for it now; empty if they need not."""
        leaving = self.state == "leaving"
        return "leaves for another model, and returns after that" if leaving else self.backend.reason or ""

    @property
    def untried_s(self) -> float:
        """For how long it is not tried again, after it failed."""
        return self.failed_at + FAILURE_S - time.monotonic()

    @property
    def free(self) -> bool:
        """Whether it may leave without taking anything from anybody."""
        return not self.running and (self.state == "leaving" or not self.waiting)


class Models:
    """All of them. Used from one event loop."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        most_loaded: int,
        most_waiting: int,
        wait_s: float,
        turn_s: float,
        tell: Callable[[str], None] = logger.info,
    ) -> None:
        """
        Args:
            models: the first is loaded at the start, and asked by whoever names none.
            most_loaded: models in memory at once.
            most_waiting: requests that wait for one model; more are refused at once.
            wait_s: how long a request waits for its model if its client cannot be told how far that is.
            turn_s: how long a model in use keeps its place, from its loading or another's asking, whichever is later.
            tell: told who comes and who goes.
        """
        self.all = {model.name: model for model in models}
        self._first = models[0]
        self._most, self._most_waiting = most_loaded, most_waiting
        self._wait_s, self._turn_s, self._tell = wait_s, turn_s, tell
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()
        """One may have become free."""
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

    async def enter(self, model: ServedModel, *, patient: bool = False) -> None:
        """Return when the model is loaded; it stays so until `release`. Raises NotReady, Busy.

        `patient`: wait as long as it takes, for whoever is told meanwhile.
        """
        if model.state != "loaded" and model.waiting >= self._most_waiting:
            raise Busy(f"{model.waiting} requests wait for the model {model.name!r} already", COME_BACK_S)
        model.waiting += 1
        try:
            async with asyncio.timeout(None if patient else self._wait_s):
                while model.state != "loaded" and not self._draining:
                    await self._wait_for(model)
            model.running += 1
        except TimeoutError:
            why = f"The model {model.name!r} is not loaded yet: {model.why}"
            raise NotReady(why, COME_BACK_S) from None
        finally:
            model.waiting -= 1
            self._news.set()
        model.used_at = time.monotonic()

    def release(self, model: ServedModel) -> None:
        """A request that entered is done."""
        model.running -= 1
        self._news.set()

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

    @property
    def failure(self) -> str:
        """Why nothing can be served: the latest failure, while no model is there or on its way, none that left in order could come
        back, and that one is not tried again; empty if something can."""
        last = max(self.all.values(), key=lambda model: model.failed_at)
        lost = last.state == "failed" and last.untried_s > 0
        lost &= all(
            m.state == "failed" or (m.state == "not loaded" and not m.loaded_at) for m in self.all.values()
        )
        return f"no model is loaded, and {last.name} cannot be: {last.failure}" if lost else ""

    def leave(self) -> None:
        """From now on /health says that no requests are wanted, while they are still served."""
        for model in self.all.values():
            model.backend.leave()

    def drain(self) -> None:
        """From now on new requests are refused for good; running ones end normally."""
        self._draining = True
        for model in self.all.values():
            model.backend.drain()
            if "load" in model.tasks:
                model.tasks["load"].cancel()

    async def cut(self) -> None:
        """End what still runs."""
        await asyncio.gather(*(model.backend.cut() for model in self.all.values()))

    async def _wait_for(self, model: ServedModel) -> None:
        """Have it loaded, if nobody does yet, and wait for the end of that, good or bad. Raises NotReady."""
        if model.state == "failed" and (left_s := model.untried_s) > 0:
            raise NotReady(f"The model {model.name!r} cannot be loaded: {model.failure}", left_s)
        if "load" not in model.tasks:
            model.asked_at = time.monotonic()
            if model.state not in ("leaving", "loading"):  # the first is loaded at the start for nobody
                self._queue(model)
            task = model.tasks["load"] = asyncio.create_task(self._bring(model))
            # Not its own `finally`: one that is cancelled before its first step never comes to that.
            task.add_done_callback(lambda _: model.tasks.pop("load"))
        await asyncio.wait({model.tasks["load"]})

    def _queue(self, model: ServedModel) -> None:
        model.state = "loading"
        model.backend.down("waits for its turn to be loaded", comes_back=True)

    async def _bring(self, model: ServedModel) -> None:
        """Load a model when it is its turn and there is room. What goes wrong is noted in it."""
        async with self._turn:
            if model.state == "loaded":  # at the start, meanwhile
                return
            await self._make_room(model)
            with contextlib.suppress(Exception):
                await self._start(model)

    async def _make_room(self, model: ServedModel) -> None:
        while True:
            self._news.clear()
            there = [other for other in self.all.values() if other.state in ("loaded", "leaving")]
            if len(there) < self._most:
                self._keep(there)
                return
            if free := [other for other in there if other.free]:
                await self._evict(min(free, key=lambda other: (other.state != "leaving", other.used_at)))
                continue
            left_s = None
            if not any(other.state == "leaving" for other in there):
                oldest = min(there, key=lambda other: other.loaded_at)
                left_s = max(oldest.loaded_at, model.asked_at) + self._turn_s - time.monotonic()
                if left_s <= 0:
                    self._tell(f"model {oldest.name} takes no new requests: {model.name} waits for its place")
                    oldest.state = "leaving"
                    continue
            model.backend.say("waits until another model is idle, or has had its turn")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._news.wait()

    def _keep(self, there: Sequence[ServedModel]) -> None:
        """Room was made by another one than the one that was to leave."""
        for model in there:
            if model.state == "leaving":
                model.state = "loaded"
                if "load" in model.tasks:
                    model.tasks["load"].cancel()  # who waits for that finds it loaded

    async def _evict(self, model: ServedModel) -> None:
        assert model.held is not None, "it is loaded"
        self._tell(f"model {model.name} leaves the memory")
        model.tasks.pop("watch").cancel()
        model.state, held = "not loaded", model.held
        model.backend.down(UNASKED, comes_back=True)
        if "load" in model.tasks:  # it was asked for while it was leaving
            self._queue(model)
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
        model.loaded_at = model.used_at
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
        self._news.set()
