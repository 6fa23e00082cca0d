"""Streams that outlive the engine that makes them: a client that asks again for what a lost engine still owed.

Each running request is remembered with the tokens already handed on. When the engine is lost, its requests wait until an
engine is healthy again and are submitted anew with those tokens as `resume_ids`, so a stream goes on where it stopped.

A request that itself kills the engine must not be replayed for ever. Who killed it cannot be seen from here, so:

1. a request whose engine is lost is replayed together with all others;
2. one that loses a second engine without a new token in between is a suspect. Suspects are tried one at a time, the worst
   first, and until the first token of the last of them nobody else may start: so bystanders are told from a killer;
3. one that twice loses the engine when nothing else ran in it fails with RequestFailed, and so does any request after
   `max_losses` engines, however far it got. Once may be chance: who kills an engine from outside does not look what runs.

A killer so costs four deaths of the engine, or a few more if its tokens die with it, and no other stream. A new token
ends suspicion. An engine that ended in order, or was not reached, makes nobody a suspect. What one that ends cuts short goes on
in the next, unless it was we who ended it.
Knows only `EngineClient`; not processes, not the wire.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from .client import EngineClient
from .errors import DeadlineExceeded, EngineLost, EngineStopped, Overloaded, RequestFailed
from .request import EngineInfo, EngineStats, FinishReason, Request, StepOutput, Timing

SUSPECT_LOSSES = 2
"""Engines lost in a row, without a token in between, from which a request is a suspect."""
LONE_LOSSES = 2
"""Of those the ones that it was alone in, from which it is guilty."""
POLL_S = 0.05
"""First pause between two looks at an engine that is away; doubles up to MAX_POLL_S."""
MAX_POLL_S = 0.25


@dataclass(slots=True, eq=False)
class _Progress:
    """What has become of one request so far."""

    request: Request
    started: float = field(default_factory=time.monotonic)
    ids: list[int] = field(default_factory=list)
    """Tokens handed on, after the request's own `resume_ids`."""
    first: Timing | None = None
    """When its first token came, told from the start: whatever becomes of that engine."""
    losses: int = 0
    losses_in_place: int = 0
    """Losses since the last token."""
    lone_losses: int = 0
    """Those of them in which nothing else ran."""
    engine: int = 0
    """Which engine it runs in, counted by losses."""
    alone: bool = False
    """On trial: nothing else runs, so if the engine is lost now it was this request."""
    waited: bool = False
    """For the trials of others."""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def take(self, output: StepOutput, asked_s: float) -> StepOutput:
        """Note an output of the engine that was asked `asked_s` after the start; return it as the caller must see it."""
        first = not self.ids
        timing = None if output.timing is None else self._timing(output.timing, asked_s)
        if output.tokens:
            self.losses_in_place = self.lone_losses = 0
            self.ids += [token.id for token in output.tokens]
            if first:
                self.first = timing or self._now()
        if not self.losses:
            return output
        return replace(
            output,
            request_id=self.request.id,
            # Later engines find other things in their caches; the caller was told at the first output.
            cached_tokens=output.cached_tokens if first else 0,
            timing=timing,
        )

    def _timing(self, timing: Timing, asked_s: float) -> Timing:
        """An engine's times, told from the caller's start: only the end of what was begun before is its own."""
        if self.first is not None:
            return replace(self.first, total_s=asked_s + timing.total_s)
        return Timing(
            queue_s=asked_s + timing.queue_s,
            first_token_s=asked_s + timing.first_token_s,
            total_s=asked_s + timing.total_s,
        )

    def _now(self) -> Timing:
        """As if it ended now. Where an engine did not say how long it waited, that was no longer than for its first token."""
        now_s = self.elapsed_s
        first = self.first or Timing(now_s, now_s, now_s)
        return replace(first, total_s=now_s)

    @property
    def left_s(self) -> float:
        """Until the request's own deadline."""
        deadline_s = self.request.deadline_s
        return math.inf if deadline_s is None else deadline_s - self.elapsed_s

    def check_deadline(self) -> None:
        """Raises DeadlineExceeded if it has passed."""
        if self.left_s <= 0:
            raise DeadlineExceeded(
                f"request {self.request.id} was not finished in {self.request.deadline_s:g} s"
            )

    async def until(self, event: asyncio.Event) -> None:
        """Wait for it. Raises DeadlineExceeded if the request's own deadline passes before."""
        self.waited = True
        try:
            await asyncio.wait_for(event.wait(), None if self.left_s == math.inf else self.left_s)
        except TimeoutError:
            self.check_deadline()

    def rest(self) -> Request:
        """What is still to be asked. Its id is fresh: the lost engine may live, and hold the old one for a moment yet.

        Raises DeadlineExceeded if no time is left for it.
        """
        request = self.request
        if self.losses:
            request = replace(
                request,
                id=f"{request.id}~{self.losses}",
                resume_ids=(*request.resume_ids, *self.ids),
                # They came with the first output.
                prompt_logprobs=None if self.ids else request.prompt_logprobs,
            )
        if request.deadline_s is not None and (self.losses or self.waited):
            self.check_deadline()
            request = replace(request, deadline_s=self.left_s)
        return request

    def ended(self) -> StepOutput | None:
        """The last output, if only the news of the end was lost with an engine."""
        if not self.losses:
            return None
        sampling, ids = self.request.sampling, (*self.request.resume_ids, *self.ids)
        if ids and ids[-1] in sampling.stop_ids:
            reason = FinishReason.STOP
        elif len(ids) >= sampling.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return None
        return StepOutput(self.request.id, (), reason, timing=self._now())


class _Trials:
    """Who may start now: everyone, or, while there are suspects, the worst of them alone."""

    def __init__(self) -> None:
        self._suspects: list[_Progress] = []
        self._on_trial: _Progress | None = None
        self._engines_lost = 0
        self._running = 0
        """In the engine that is there now; what an engine loses, it loses all at once."""
        self._news = asyncio.Event()

    @asynccontextmanager
    async def attempt(self, progress: _Progress) -> AsyncIterator[None]:
        """Wait until it may start; it runs until the end of the block."""
        while not self._may_start(progress):
            await progress.until(self._news)
        if progress in self._suspects:
            self._on_trial = progress
            progress.alone = not self._running
        engine = progress.engine = self._engines_lost
        self._running += 1
        try:
            yield
        finally:
            if engine == self._engines_lost:
                self._running -= 1
            self._end_trial(progress)

    def engine_lost(self, progress: _Progress) -> None:
        """The engine that `progress` ran in is gone, whether or not the slower readers have noticed."""
        if progress.engine == self._engines_lost:
            self._engines_lost += 1
            self._running = 0

    def accuse(self, progress: _Progress) -> None:
        """From now on nobody starts before it was tried."""
        if progress not in self._suspects:
            self._suspects.append(progress)

    def acquit(self, progress: _Progress) -> None:
        """It has made a token, or is gone."""
        if progress in self._suspects:
            self._suspects.remove(progress)
            self._end_trial(progress)

    def _may_start(self, progress: _Progress) -> bool:
        if not self._suspects:
            return True
        return self._on_trial is None and progress is max(self._suspects, key=lambda p: p.losses_in_place)

    def _end_trial(self, progress: _Progress) -> None:
        progress.alone = False
        if self._on_trial is progress:
            self._on_trial = None
        self._news.set()
        self._news = asyncio.Event()


class ReplayingClient:
    """An `EngineClient` over another one, whose streams survive EngineLost."""

    def __init__(
        self, inner: EngineClient, *, recovery_timeout_s: float = 120.0, max_losses: int = 20
    ) -> None:
        """
        Args:
            inner: Where requests really go. Closed with this client.
            recovery_timeout_s: How long a stream waits for an engine before it ends with EngineLost.
            max_losses: How many engines one request may lose.
        """
        self._inner = inner
        self._recovery_timeout_s = recovery_timeout_s
        self._max_losses = max_losses
        self._recovering: asyncio.Task[None] | None = None
        self._trials = _Trials()
        self._closed = asyncio.Event()
        self._leaving = False
        self.replays = 0
        """Requests submitted again since the start, for the metrics."""

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `EngineClient.submit`. EngineLost is raised only if no engine came back in time."""
        progress = _Progress(request)
        try:
            while (last := progress.ended()) is None:
                await self._recovered(progress)
                async with self._trials.attempt(progress):
                    await self._recovered(progress)  # it may have died of a suspect meanwhile
                    try:
                        async with aclosing(self._attempt(progress)) as outputs:
                            async for output in outputs:
                                yield output
                        return
                    except EngineLost as error:
                        self._judge(progress, error)
        finally:
            self._trials.acquit(progress)
        yield last

    async def _attempt(self, progress: _Progress) -> AsyncGenerator[StepOutput, None]:
        """Ask one engine for the rest."""
        give_up = time.monotonic() + self._recovery_timeout_s
        self.replays += bool(progress.losses)
        while True:
            asked_s = progress.elapsed_s if progress.losses else 0.0
            try:
                async with aclosing(self._inner.submit(progress.rest())) as outputs:
                    async for output in outputs:
                        if output.tokens:
                            self._trials.acquit(progress)
                        if output.finish_reason is FinishReason.ABORT and not self._leaving:
                            if output.tokens:
                                yield progress.take(replace(output, finish_reason=None), asked_s)
                            raise EngineLost("the engine was told to end", blameless=True)
                        yield progress.take(output, asked_s)
                return
            except (Overloaded, EngineStopped) as error:
                # Raised before any output. A caller may be refused a request, but not the rest of one we took.
                pause = error.retry_after_s if isinstance(error, Overloaded) else MAX_POLL_S
                pause = min(pause, progress.left_s)
                if not progress.losses or self._closed.is_set() or time.monotonic() + pause > give_up:
                    raise
            await self._pause(pause)

    def _judge(self, progress: _Progress, error: EngineLost) -> None:
        """Count a loss. Raises if the request may not be replayed."""
        if self._closed.is_set():
            raise error
        progress.losses += 1
        if not error.blameless:
            self._trials.engine_lost(progress)
            progress.losses_in_place += 1
            progress.lone_losses += progress.alone
        if progress.lone_losses >= LONE_LOSSES or progress.losses >= self._max_losses:
            raise RequestFailed(
                f"request {progress.request.id} ran in {progress.losses} engines that were lost "
                f"({progress.losses_in_place} without a new token) and is not tried again; last: {error}"
            ) from error
        if progress.losses_in_place >= SUSPECT_LOSSES:
            self._trials.accuse(progress)

    async def _recovered(self, progress: _Progress) -> None:
        """Return when an engine is healthy, if one was lost; one look-out serves all who wait."""
        if not progress.losses:
            return
        if self._recovering is None or self._recovering.done():
            self._recovering = asyncio.ensure_future(self._look_out())
        recovering = self._recovering
        await asyncio.wait([recovering], timeout=min(self._recovery_timeout_s, progress.left_s))
        if self._closed.is_set():
            raise EngineLost("this client was closed while the request waited for an engine")
        progress.check_deadline()
        if not recovering.done():
            raise EngineLost(
                f"no engine was healthy in the {self._recovery_timeout_s:g} s after one was lost"
            )

    async def _look_out(self) -> None:
        pause = POLL_S
        while not self._closed.is_set() and not await self._inner.health():
            await self._pause(pause)
            pause = min(2 * pause, MAX_POLL_S)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past `close`."""
        try:
            await asyncio.wait_for(self._closed.wait(), seconds)
        except TimeoutError:
            pass

    def leave(self) -> None:
        """From now on the engine is ended by us: what it cuts short has ended."""
        self._leaving = True

    async def info(self) -> EngineInfo:
        """See `EngineClient.info`."""
        return await self._inner.info()

    async def load_adapter(self, name: str, folder: str) -> None:
        """See `EngineClient.load_adapter`."""
        await self._inner.load_adapter(name, folder)

    async def unload_adapter(self, name: str) -> None:
        """See `EngineClient.unload_adapter`."""
        await self._inner.unload_adapter(name)

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        return await self._inner.stats()

    async def health(self) -> bool:
        """See `EngineClient.health`."""
        return await self._inner.health()

    async def drain(self, timeout_s: float) -> None:
        """See `EngineClient.drain`. Who waits for an engine then waits no more."""
        self.leave()
        try:
            await self._inner.drain(timeout_s)
        finally:
            self._closed.set()

    async def close(self) -> None:
        """See `EngineClient.close`."""
        self._closed.set()
        await self._inner.close()
