"""Which engines there are, and how each is: names are resolved and engines are asked again and again.

An engine that ends (NOT_SERVING) or whose name does not stand for it any more may finish what it has; one that serves
something else is not used. Knows addresses and states; requests are `replicas.py`'s.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from .address import DNS, resolve
from .replica import STATES, Replica, ReplicaClient, State
from .request import EngineInfo, EngineStats
from .rpc_client import RpcClient
from .totals import count_on, sum_infos

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Pause between two looks at an engine, and at what a name stands for."""
AGREED = (
    "model_sha", "dtype", "quantize", "kv_dtype", "vocab_size", "max_total_tokens", "max_input_tokens", "page_tokens",
    "adapters",
)  # fmt: skip
"""What all engines must say alike, so that a stream can go on in another one. The first that answers decides."""


class Fleet:
    """The engines at some addresses. Used from one event loop."""

    def __init__(
        self,
        addresses: Sequence[str],
        model_id: str,
        *,
        on_change: Callable[[], None] = lambda: None,
        connect: Callable[[str], ReplicaClient] = RpcClient,
        look_s: float = LOOK_S,
    ) -> None:
        """
        Args:
            addresses: as `address.check_address` takes them; `dns:///NAME:PORT` is resolved again and again.
            model_id: what they have to serve.
            on_change: told when an engine comes, goes, or is in another state.
            connect: makes the client of an address.
            look_s: pause between two looks, seconds.
        """
        self._places: dict[str, Collection[str]] = {
            address: () if address.startswith(DNS) else (address,) for address in addresses
        }
        """Address as given -> what it stands for now."""
        self._names = [address for address in addresses if address.startswith(DNS)]
        self._unknown: set[str] = set()
        """Those of them that could not be resolved the last time."""
        self._model_id, self._on_change, self._connect, self._look_s = model_id, on_change, connect, look_s
        self._replicas: dict[str, Replica] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.agreed: EngineInfo | None = None
        """What the first engine that answered said of itself."""
        self.past: EngineStats | None = None
        """What engines had counted that are not asked any more."""
        self.serves = asyncio.Event()
        """Set while one of them takes requests."""

    async def start(self) -> None:
        """Return when one of the engines serves. Whatever happens, `close` must be called in the end."""
        for place in self._names:
            self._tasks[place] = asyncio.create_task(self._follow(place))
        await self._keep_up()
        await self.serves.wait()

    async def survey(self) -> None:
        """Look once at all there are."""
        for place in self._names:
            await self._resolve(place)
        await self._gather()
        await asyncio.gather(*(self.look(replica) for replica in self.all))

    @property
    def all(self) -> Collection[Replica]:
        """All of them, as they came."""
        return self._replicas.values()

    @property
    def answering(self) -> list[Replica]:
        """Those that tell of themselves."""
        return [replica for replica in self.all if replica.state in ("serving", "draining")]

    def at(self, address: str | None) -> Replica | None:
        """The engine at an address."""
        return None if address is None else self._replicas.get(address)

    @property
    def states(self) -> Mapping[str, int]:
        """How many engines are in which state."""
        counts = Counter(replica.state for replica in self.all)
        return {state: counts[state] for state in STATES}

    @property
    def told(self) -> str:
        """Where each is, for people."""
        told = [f"{replica.address} is {replica.told}" for replica in self.all]
        return ", ".join(told) or f"nobody is found at {', '.join(self._places)}"

    @property
    def info(self) -> EngineInfo | None:
        """What those that answer say together; None if none does."""
        infos = [replica.info for replica in self.answering if replica.info is not None]
        return sum_infos(infos) if infos else None

    def turn(self, replica: Replica, state: State, why: str = "") -> None:
        """One is seen to be in this state."""
        if replica.turn(state, why):
            self._changed()

    async def look(self, replica: Replica) -> None:
        """Ask one how it is."""
        before = replica.info
        changed = await replica.look(self._differs)
        if changed or replica.info != before:
            self._changed()

    async def close(self) -> None:
        """Look no more, and break all connections."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.gather(*(replica.client.close() for replica in self.all))

    async def _watch(self, replica: Replica) -> None:
        while True:
            await self.look(replica)
            await asyncio.sleep(self._look_s)

    def _changed(self) -> None:
        if any(replica.takes for replica in self.all):
            self.serves.set()
        else:
            self.serves.clear()
        self._on_change()

    def _differs(self, info: EngineInfo) -> str:
        """Why an engine that says this may not be used, or nothing."""
        if info.model_id != self._model_id:
            return f"it serves {info.model_id}, and this front {self._model_id}"
        if self.agreed is None:
            self.agreed = info
        for name in AGREED:
            its, ours = getattr(info, name), getattr(self.agreed, name)
            if its != ours:
                return (
                    f"its {name} is {its!r}, and was {ours!r} in the first engine: give all the same options"
                )
        return ""

    async def _follow(self, place: str) -> None:
        """Keep up with what a name stands for. What it does not stand for any more may finish what it has."""
        while True:
            await self._resolve(place)
            await self._keep_up()
            await asyncio.sleep(self._look_s)

    async def _resolve(self, place: str) -> None:
        try:
            self._places[place] = await resolve(place)
            self._unknown.discard(place)
        except OSError as error:  # Nobody is ready, or the name server is not: who is known is known.
            if place not in self._unknown:
                logger.warning("%s cannot be resolved: %s", place, error)
            self._unknown.add(place)

    async def _keep_up(self) -> None:
        """Have those engines that there are now, and look at each from now on."""
        await self._gather()
        for replica in self.all:
            if replica.address not in self._tasks:
                self._tasks[replica.address] = asyncio.create_task(self._watch(replica))

    async def _gather(self) -> None:
        """Take in the engines at all places, and let go of those at none that have nothing left to do."""
        changed = False
        wanted = dict.fromkeys(address for addresses in self._places.values() for address in addresses)
        for address in wanted:
            if address not in self._replicas:
                self._replicas[address] = Replica(address, self._connect(address))
                changed = True
        for address, replica in list(self._replicas.items()):
            changed |= replica.listed != (address in wanted)
            replica.listed = address in wanted
            if not replica.listed and not replica.requests:
                changed |= await self._part(replica)
        if changed:
            self._changed()

    async def _part(self, replica: Replica) -> bool:
        """Let go of an engine; what it had counted stays. Whether it is gone by this."""
        if replica in self.answering:
            await self.look(replica)
        if replica.listed or self._replicas.pop(replica.address, None) is None:
            return False  # another name's turn was quicker
        if (task := self._tasks.pop(replica.address, None)) is not None:
            task.cancel()
        if replica.stats is not None:
            self.past = replica.stats if self.past is None else count_on(self.past, replica.stats)
        await replica.client.close()
        return True
