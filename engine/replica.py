"""One engine of several, as the front that uses it sees it: how it is, what it serves, how busy it is.

Knows one client and what its engine says; not the other engines, and not who chooses between them.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from .client import EngineClient
from .errors import EngineLost
from .request import EngineInfo, EngineStats
from .totals import count_on, restarted

logger = logging.getLogger(__name__)

State = Literal["serving", "draining", "away", "refused"]
STATES: tuple[State, ...] = get_args(State)
"""Takes requests · answers, but takes none (it ends, or is not well) · does not answer · serves something else."""


class ReplicaClient(EngineClient, Protocol):
    """What `rpc_client.RpcClient` is."""

    async def serving(self) -> bool: ...

    def cancel_all(self) -> None: ...


class Replica:
    """One engine. Used from one event loop."""

    def __init__(self, address: str, client: ReplicaClient) -> None:
        self.address = address
        self.client = client
        self.state: State = "away"
        self._why = "it has not answered yet"
        self.listed = True
        """Whether its address still stands for it. If not, it only finishes what it has."""
        self.info: EngineInfo | None = None
        """What it said last, though it may be away now."""
        self.stats: EngineStats | None = None
        """The same; its counters never fall, though the process may be another one by now."""
        self.requests = 0
        """Of ours, that run in it or wait there."""
        self.tokens = 0
        """Of those requests, prompts and outputs."""
        self.chosen = 0
        """When it was last given a request, counted in requests."""
        self._said: EngineStats | None = None
        self._before: EngineStats | None = None
        """Of the processes before this one."""
        self._foreign_requests = self._foreign_tokens = 0
        """Of other fronts, at the last look."""
        self._looking = asyncio.Lock()

    @property
    def load(self) -> float:
        """Lanes that requests take or wait for, as a share of all, plus the share of the KV pool that their tokens take."""
        if self.info is None:
            return 0.0
        pool = max(1, self.info.pages * self.info.page_tokens)
        lanes = (self.requests + self._foreign_requests) / self.info.lanes
        return lanes + (self.tokens + self._foreign_tokens) / pool

    @property
    def takes(self) -> bool:
        """Whether it may be given requests."""
        return self.listed and self.state == "serving"

    @property
    def told(self) -> str:
        """How it is and why, for people."""
        return f"{self.state}: {self._why}" if self._why else self.state

    @contextlib.contextmanager
    def hold(self, tokens: int) -> Iterator["Held"]:
        """Count one of our requests, of so many tokens, for a block."""
        held = Held(self, tokens)
        self.requests += 1
        self.tokens += tokens
        try:
            yield held
        finally:
            self.requests -= 1
            self.tokens -= held.tokens

    async def look(self, differs: Callable[[EngineInfo], str]) -> bool:
        """Ask how it is; whether it is in another state now. `differs` says why it may not be used, or nothing."""
        async with self._looking:  # answers that overtake each other would look like another process
            try:
                serving = await self.client.serving()
                info, stats = await asyncio.gather(self.client.info(), self.client.stats())
            except EngineLost as error:
                return self.turn("away", str(error))
            self.info = info
            if why := differs(info):
                return self.turn("refused", why)
            self._take(info, stats)
            return self.turn("serving" if serving else "draining")

    def turn(self, state: State, why: str = "") -> bool:
        """From now on it is so; whether it was not. A change is told in the log."""
        self._why = why
        if state == self.state:
            return False
        self.state = state
        level = logging.INFO if state in ("serving", "draining") else logging.WARNING
        logger.log(level, "engine %s is %s", self.address, self.told)
        return True

    def _take(self, info: EngineInfo, said: EngineStats) -> None:
        held_tokens = (said.pages_total - said.pages_free) * info.page_tokens
        self._foreign_requests = max(0, said.lanes_active + said.queued - self.requests)
        self._foreign_tokens = max(0, held_tokens - self.tokens)
        if self._said is not None and restarted(self._said, said):
            self._before = self.stats
        self._said = said
        self.stats = said if self._before is None else count_on(self._before, said)


@dataclass(slots=True)
class Held:
    """A request that runs in an engine."""

    replica: Replica
    tokens: int

    def add(self, tokens: int) -> None:
        """Count tokens that it got."""
        self.tokens += tokens
        self.replica.tokens += tokens
