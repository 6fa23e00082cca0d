"""Several engines as one `EngineClient`: each request goes to the engine that has most of its prompt, or the least to do.

The engines run elsewhere and are not ours: they come and go, and others may use them too. A request that an engine refuses,
or that does not reach it, is given to the next; one whose engine is lost, or ends before it is done, ends with EngineLost,
and `replay` asks for the rest. Knows loads and beginnings of prompts; who is there is `fleet.py`'s.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import aclosing
from dataclasses import replace

from .affinity import Affinity
from .errors import EngineError, EngineLost, EngineStopped, InvalidRequest, Overloaded
from .fleet import Fleet
from .replica import Held, Replica
from .request import EngineInfo, EngineStats, FinishReason, Request, StepOutput
from .totals import sum_stats

NOTABLY = 0.25
"""How much more load an engine may have than the least one, and still get the requests that begin as those it had."""
FRESH_S = 1.0
"""How long statistics wait for news of an engine; then what it said last serves."""
NOT_OURS = "engines that run elsewhere (--engine) have their adapters from their start: name them there with --lora-adapters"
ABORT_S = 5.0
"""Time in which requests that are ended have to be gone."""


class Replicas:
    """The engines of a fleet, which is closed with this client. Used from one event loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._affinity: Affinity | None = None
        self._chosen = self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `EngineClient.submit`. EngineLost is also raised if no engine serves."""
        if self._draining:
            raise EngineStopped("this front is stopping and sends no more requests")
        tried: list[Replica] = []
        refusal: EngineError | None = None
        while (replica := self._choose(request, tried)) is not None:
            tried.append(replica)
            begun = False
            try:
                with self._held(replica, request) as held:
                    async with aclosing(replica.client.submit(request)) as outputs:
                        async for output in outputs:
                            begun |= bool(output.tokens)
                            held.add(len(output.tokens))
                            if output.finish_reason is FinishReason.ABORT and not self._draining:
                                if output.tokens:
                                    yield replace(output, finish_reason=None)
                                raise EngineStopped(f"the engine at {replica.address} ends")
                            yield output
                return
            except Overloaded as error:
                refusal = error
            except EngineStopped as error:
                self._fleet.turn(replica, "draining")
                if begun:
                    raise EngineLost(str(error), blameless=True) from error
            except EngineLost as error:
                self._fleet.turn(replica, "away", str(error))
                if not error.blameless:
                    raise
        raise refusal or EngineLost(f"none of the engines serves: {self._fleet.told}", blameless=True)

    async def info(self) -> EngineInfo:
        """See `EngineClient.info`. Of all engines that answer, together."""
        if (info := self._fleet.info) is None:
            raise EngineLost(f"none of the engines answers: {self._fleet.told}")
        return info

    async def load_adapter(self, name: str, folder: str) -> None:
        """See `EngineClient.load_adapter`. Refused: engines come and go, and others use them too."""
        raise InvalidRequest(NOT_OURS)

    async def unload_adapter(self, name: str) -> None:
        """See `EngineClient.unload_adapter`. Refused, too."""
        raise InvalidRequest(NOT_OURS)

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`. Of all engines together; their lanes are numbered through."""
        looks = [asyncio.ensure_future(self._fleet.look(replica)) for replica in self._fleet.answering]
        if looks:
            _, late = await asyncio.wait(looks, timeout=FRESH_S)
            for look in late:
                look.cancel()
        now = [(r.info, r.stats) for r in self._fleet.answering if r.info is not None and r.stats is not None]
        if not now:
            raise EngineLost(f"none of the engines answers: {self._fleet.told}")
        away = [r.stats for r in self._fleet.all if r not in self._fleet.answering]
        return sum_stats(now, [stats for stats in (*away, self._fleet.past) if stats is not None])

    async def health(self) -> bool:
        """See `EngineClient.health`. Whether one of them serves, as it was at the last look."""
        return self._fleet.serves.is_set()

    async def drain(self, timeout_s: float) -> None:
        """See `EngineClient.drain`. Of our requests: the engines go on for others."""
        self._draining = True
        for grace_s in (timeout_s, ABORT_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._idle.wait()
            if self._idle.is_set():
                return
            for replica in self._fleet.all:
                replica.client.cancel_all()

    async def close(self) -> None:
        """See `EngineClient.close`."""
        await self._fleet.close()

    def _choose(self, request: Request, tried: Collection[Replica]) -> Replica | None:
        """Where it goes now; None if there is nobody left to ask."""
        there = [replica for replica in self._fleet.all if replica.takes and replica not in tried]
        if not there:
            return None
        chosen = min(there, key=lambda replica: (replica.load, replica.chosen))
        if len(self._fleet.all) > 1:
            chosen = self._kin(request, there, chosen)
        self._chosen += 1
        chosen.chosen = self._chosen
        return chosen

    def _kin(self, request: Request, there: Collection[Replica], least: Replica) -> Replica:
        """The engine that had a prompt with this beginning, unless it is notably busier than the least busy one."""
        if self._affinity is None:
            assert self._fleet.agreed is not None, "an engine takes requests"
            self._affinity = Affinity(self._fleet.agreed.page_tokens)
        keys = self._affinity.keys(request)
        owner = self._fleet.at(self._affinity.owner(keys))
        chosen = least
        if owner is not None and owner in there and owner.load <= least.load + NOTABLY:
            chosen = owner
        self._affinity.note(keys, chosen.address)
        return chosen

    @contextlib.contextmanager
    def _held(self, replica: Replica, request: Request) -> Iterator[Held]:
        """Count a request where it runs."""
        self._running += 1
        self._idle.clear()
        try:
            with replica.hold(len(request.prompt_ids) + len(request.resume_ids)) as held:
                yield held
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
