"""What stands behind the front, and whether it can be used now. Filled in by whoever starts the engine.

The HTTP port is open from the first second; until `ready` is called, and again after `down`, every generation is
answered with the reason why not yet. Knows no HTTP.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..engine import EngineClient, EngineError, EngineInfo
from .declared import Declared, find_declared
from .errors import NotReady
from .reasoning import Markers, find_markers
from .text import TextTokenizer
from .tool_formats import PLAIN, ToolFormat, find_format, kept_ids

CUT_S = 5.0
"""Time in which requests that are ended have to be gone."""


@dataclass(frozen=True, slots=True)
class Serving:
    """All that answering a request takes, together or not at all."""

    engine: EngineClient
    tokenizer: TextTokenizer
    info: EngineInfo
    markers: Markers | None
    """How the model marks its thinking, if it thinks."""
    tool_format: ToolFormat
    """How it writes calls of tools."""
    tool_ids: frozenset[int]
    """Control tokens that it writes them with."""
    declared: Declared | None = None
    """How its answers are to be read, where its own word is needed for that."""


class Backend:
    """The one changing thing between the starter of the engine and the routes. Used from one event loop."""

    def __init__(self, hub_cache: str | None = None) -> None:
        """`hub_cache` is where what comes from the Hub is kept; None for its client's own place."""
        self.hub_cache = hub_cache
        self._serving: Serving | None = None
        self._info: EngineInfo | None = None
        self._reason = "starting"
        self._leaving = self._draining = self._comes_back = False
        self.restarts = 0
        """Engines that came after one that died."""
        self.engines: Mapping[str, int] = {}
        """How many of several engines are in which state; empty for one of our own."""

    def say(self, reason: str) -> None:
        """What is being waited for, shown by /health: "loading weights 40 %"."""
        self._reason = reason

    def ready(self, engine: EngineClient, tokenizer: TextTokenizer, info: EngineInfo) -> None:
        """From now on requests are served."""
        form, markers = find_format(tokenizer), find_markers(tokenizer)
        # A format that is known here is read as it comes, arguments too, and forgives more.
        declared = find_declared(tokenizer) if form is PLAIN else None
        if declared is not None:
            form, markers = declared.tool_format, declared.markers
        marks = kept_ids(form, tokenizer)
        self._serving = Serving(engine, tokenizer, info, markers, form, marks, declared)
        self._info, self._reason = info, ""

    def update(self, info: EngineInfo) -> None:
        """What is served has other sizes or adapters now: engines or adapters came or went."""
        if self._serving is not None:
            self._serving = replace(self._serving, info=info)
            self._info = info

    def down(self, reason: str, *, comes_back: bool = False) -> None:
        """From now on requests are refused, for this reason; running ones are not touched. `comes_back`: until one asks for
        it to be loaded."""
        self._serving = None
        self._reason, self._comes_back = reason, comes_back

    def leave(self) -> None:
        """From now on /health says that no requests are wanted, while they are still served."""
        self._leaving = True

    def drain(self) -> None:
        """From now on new requests are refused for good; running ones end normally."""
        self._draining = True

    async def cut(self) -> None:
        """End what still runs, so that each client is told instead of cut off."""
        if self._serving is not None:
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(CUT_S):
                    await self._serving.engine.drain(0.0)

    @property
    def reason(self) -> str | None:
        """Why requests are refused now, or will be in a moment; None if they are welcome."""
        if self._leaving or self._draining:
            return "shutting down"
        return None if self._serving is not None else self._reason

    @property
    def comes_back(self) -> bool:
        """Whether it is away until a request asks for it."""
        return self._comes_back and not (self._leaving or self._draining)

    @property
    def latest(self) -> Serving | None:
        """What is there, whether or not it takes requests; for health and metrics."""
        return self._serving

    @property
    def info(self) -> EngineInfo:
        """What was served last, though it may be away now. Raises NotReady."""
        return self._info or self.serving().info

    def serving(self) -> Serving:
        """What to serve with. Raises NotReady."""
        if self._serving is None or self._draining:
            what = "The model is not loaded" if self.comes_back else "The server takes no requests now"
            raise NotReady(f"{what}: {self.reason}")
        return self._serving
