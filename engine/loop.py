"""The engine's thread: intake -> plan -> launch -> read the turn before -> emit. The only one that touches the device.

It runs one turn ahead: turn n+1 is launched before turn n is read, so the device never waits for the host. Submitting
and cancelling happen on other threads and are only noted there. If the loop fails, every waiter is told and the engine
counts as dead. Knows no asyncio and no wire.

A sequence with a grammar cannot run ahead: its next token's mask follows from its last token. The mask is computed from
the moment that token is read, while the device works on the turn just launched, and the sequence is in the turn after
that one: every second turn beside free sequences, every turn alone. A mask that takes long is waited for only if nobody can
do anything without it.

Guesses at a sequence's next tokens need its last one, too. While there is hope of some (`Scheduler.hopes`), nobody runs
ahead: the device waits for the host, which costs less than a launch without guesses.
"""

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from .errors import DeadlineExceeded, EngineError, EngineLost, EngineStopped, InvalidRequest, RequestFailed
from .local import Delivery, RequestError, Sink
from .runner import Launch, Runner
from .scheduler import Scheduler
from .sequence import Phase, Sequence
from .stats import Counters
from .turn import Size, Turn

logger = logging.getLogger(__name__)

STALL_S = 60.0
"""A loop that has work but has not turned for so long is not healthy."""
LEAST_PATIENCE_S = 0.0005
"""For masks, at least; at most half a step, in which the device has something to do, or everybody waits for one."""


class Loop:
    """Runs sequences. `start` it once; `submit` and `cancel` from anywhere."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        counters: Counters,
        observe: Callable[[Size, float, int], None] = lambda size, seconds, behind: None,
    ) -> None:
        """`observe` is told what each launch took, and behind how many tokens its prompts' are."""
        self._runner = runner
        self._observe = observe
        self._scheduler = scheduler
        self._counters = counters
        self._wake = threading.Condition()
        self._arrived: deque[Sequence] = deque()
        self._cancelled: set[str] = set()
        self._live: dict[str, Sequence] = {}
        """Every sequence between submit and its last output, by request id. Guarded by `_wake`."""
        self._delivering = False
        """Last outputs are on their way to their sinks. Guarded by `_wake`."""
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._stuck = False
        """The last turn had nothing to launch and nothing to read, and nothing has happened since."""
        self._late: set[Future[np.ndarray]] = set()
        """Masks that were waited for before."""
        self._closed = False
        self._stopping = False
        self._failed: str | None = None
        self._turned_s = time.monotonic()
        self.thread = threading.Thread(target=self._main, name="xlane-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self.thread.start()

    @property
    def live(self) -> int:
        """Requests not yet ended."""
        return len(self._live)

    def computes_with(self, adapter: int) -> bool:
        """Whether any request, running or waiting, has the adapter of this number."""
        with self._wake:
            return any(sequence.adapter == adapter for sequence in self._live.values())

    def submit(self, sequence: Sequence, most_live: int | None = None) -> bool:
        """Hand over a new sequence; False, and nothing done, if `most_live` requests are inside already.

        Raises EngineStopped, and InvalidRequest for an id that is in use.
        """
        with self._wake:
            if self._closed or self._failed:
                raise EngineStopped(self._failed or "the engine is stopping and takes no more requests")
            if sequence.request.id in self._live:
                raise InvalidRequest(
                    f"request id {sequence.request.id!r} is already running; use a fresh id for each request"
                )
            if most_live is not None and len(self._live) >= most_live:
                return False
            if not self._live:
                self._turned_s = time.monotonic()
            self._live[sequence.request.id] = sequence
            self._arrived.append(sequence)
            self._wake.notify_all()  # one condition for the loop and for those who wait for it to be idle
            return True

    def cancel(self, request_id: str) -> None:
        """End a request early. Unknown ids are ignored."""
        with self._wake:
            if request_id in self._live:
                self._cancelled.add(request_id)
                self._wake.notify_all()

    def close_intake(self) -> None:
        """Take no new requests from now on; those inside go on."""
        with self._wake:
            self._closed = True

    def cancel_all(self) -> None:
        """End every request early."""
        with self._wake:
            self._cancelled.update(self._live)
            self._wake.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is left and every last output is delivered; False if the time runs out."""

        def idle() -> bool:
            return self._failed is not None or not (self._live or self._delivering)

        with self._wake:
            return self._wake.wait_for(idle, timeout_s)

    def stop(self) -> None:
        """End all requests with ABORT, then the thread."""
        with self._wake:
            self._closed = self._stopping = True
            self._cancelled.update(self._live)
            self._wake.notify_all()
        if self.thread.is_alive():
            self.thread.join(STALL_S)

    def healthy(self) -> bool:
        """Alive, and taking work."""
        return self.alive() and not self._closed

    @property
    def ended(self) -> bool:
        """In order: nothing is under way, and nothing had failed."""
        return self._failed is None and not self.thread.is_alive()

    def alive(self) -> bool:
        """The thread has not failed, and has turned recently if it had work."""
        if self._failed or not self.thread.is_alive():
            return False
        return not self._live or time.monotonic() - self._turned_s < STALL_S

    def _main(self) -> None:
        try:
            self._serve()
        except Exception as error:  # whatever it was, the waiters must hear of it
            self._fail(f"the engine failed: {type(error).__name__}: {error}")
            raise

    def _serve(self) -> None:
        behind: Launch | None = None
        behind_s = 0.0
        while True:
            if not self._intake(block=behind is None):
                return
            started, waited_s, read = time.perf_counter(), 0.0, behind
            if behind is not None and self._scheduler.hopes:
                waited_s, behind = self._finish(behind, behind_s), None
            read_s = time.perf_counter() - started
            self._await_masks(device_works=behind is not None)
            started = time.perf_counter() - read_s
            turn = self._scheduler.plan()
            ahead_s = time.perf_counter()
            ahead = self._runner.launch(turn)
            self._stuck = ahead is None and read is None
            self._stamp(turn)
            if behind is not None:
                waited_s = self._finish(behind, behind_s)
            if read is not None:
                self._count(read, time.perf_counter() - started, waited_s)
            behind, behind_s = ahead, ahead_s
            self._turned_s = time.monotonic()

    def _await_masks(self, device_works: bool) -> None:
        """Let masks become ready, but nobody's step wait for somebody's that takes long. A sequence that can have none ends."""
        guided = self._scheduler.guided()
        masks = [sequence.guide.mask for sequence in guided if sequence.guide is not None]
        if missing := [mask for mask in masks if not mask.done()]:
            self._wait_for(missing, device_works)
        failed: list[tuple[Sequence, Delivery]] = []
        for sequence, mask in zip(guided, masks):
            if mask.done() and (error := mask.exception()) is not None:
                failed.append(self._end_with(sequence, error))
        self._emit(failed)

    def _wait_for(self, missing: list[Future[np.ndarray]], device_works: bool) -> None:
        """Until one of these is there, if nothing can be done before. Else a moment, so that they go on together; where the device
        would wait, too, only once for each."""
        new = [mask for mask in missing if mask not in self._late]
        for mask in new:
            mask.add_done_callback(self._notice)
        if self._stuck and len(missing) == self._scheduler.running:
            awaited, enough, patience_s = missing, any, self._until_deadline(STALL_S / 4)
        else:
            awaited, enough = (missing if device_works else new), all
            worth = device_works or all(one.guide is not None for one in self._scheduler.sequences())
            patience_s = max(LEAST_PATIENCE_S, self._counters.step_ms / 2e3 if worth else 0.0)
        with self._wake:
            self._wake.wait_for(
                lambda: self._has_news() or enough(mask.done() for mask in awaited), patience_s
            )
        self._late = {mask for mask in missing if not mask.done()}

    def _until_deadline(self, most_s: float) -> float:
        """Seconds until the next deadline, at most so many."""
        return min(most_s, self._deadlines[0][0] - time.monotonic()) if self._deadlines else most_s

    def _notice(self, mask: object) -> None:
        with self._wake:
            self._wake.notify_all()

    def _end_with(self, sequence: Sequence, error: BaseException) -> tuple[Sequence, Delivery]:
        """End one sequence with an error."""
        self._scheduler.drop(sequence)
        if not isinstance(error, EngineError):
            logger.error("request %s failed", sequence.request.id, exc_info=error)
            error = RequestFailed(f"the engine failed at this request: {error!r}")
        return sequence, RequestError(sequence.request.id, error)

    def _stamp(self, turn: Turn) -> None:
        """Note when a sequence first got to work, and beside how many."""
        now = time.monotonic()
        new = [sequence for sequence in turn.prefilled if not sequence.launched_s]
        for sequence in new:
            sequence.launched_s = now
        if turn.segments:
            self._counters.prefill_rows.observe(len(turn.segments))
        self._counters.joins += bool(new) and any(sequence not in new for sequence in turn.decoded)

    def _count(self, launch: Launch, wall_s: float, waited_s: float) -> None:
        self._counters.prefill_tokens += launch.prompt_tokens
        self._counters.steps += launch.rows > 0
        self._counters.turn(wall_s - waited_s, wall_s, decode_only=launch.prompt_tokens == 0)

    def _intake(self, block: bool) -> bool:
        """Take in what other threads noted. With nothing to do at all, wait. False: the thread shall end."""
        with self._wake:
            if block and not self._has_work():
                self._counters.rest()
                self._wake.wait_for(self._has_work)
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, set()
            self._turned_s = time.monotonic()
        for sequence in arrived:
            self._scheduler.add(sequence)
            if sequence.deadline_s is not None:
                heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.arrival, sequence))
        ended: list[tuple[Sequence, Delivery]] = []
        for request_id in cancelled:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self._scheduler.drop(sequence)
                ended.append((sequence, sequence.abort()))
        ended += self._overdue()
        self._stuck &= not (arrived or ended)
        self._emit(ended)
        return not (self._stopping and not self._live)

    def _has_news(self) -> bool:
        return bool(self._arrived or self._cancelled or self._stopping)

    def _has_work(self) -> bool:
        return bool(self._has_news() or self._scheduler.running or self._scheduler.waiting)

    def _overdue(self) -> list[tuple[Sequence, Delivery]]:
        """Drop the sequences whose deadline has passed."""
        if len(self._deadlines) > 2 * len(self._live) + 64:
            # Most of them ended long before their deadline: forget those, with their tokens.
            self._deadlines = [entry for entry in self._deadlines if entry[2].phase is not Phase.FINISHED]
            heapq.heapify(self._deadlines)
        failed: list[tuple[Sequence, Delivery]] = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.phase is not Phase.FINISHED:
                done = len(sequence.tokens) - sequence.prompt_tokens
                text = f"deadline of {sequence.request.deadline_s} s passed after {done} generated tokens"
                failed.append(self._end_with(sequence, DeadlineExceeded(text)))
        return failed

    def _finish(self, launch: Launch, launched_s: float) -> float:
        """Read a launch and count it; returns the seconds waited."""
        started = time.perf_counter()
        waited_s = self._read(launch)
        kind = self._counters.prefill if launch.prompt_tokens else self._counters.decode
        took_s = self._counters.launched(kind, launched_s, started + waited_s, time.perf_counter())
        self._observe(launch.size, took_s, launch.behind)
        return waited_s

    def _read(self, launch: Launch) -> float:
        """Wait for a launch and emit what it made; returns the seconds waited."""
        started = time.perf_counter()
        results = launch.read()
        waited_s = time.perf_counter() - started
        for sequence, scored in launch.read_prompts():
            sequence.prompt += scored
        outputs: list[tuple[Sequence, Delivery]] = []
        for sequence, made, offered in results:
            try:
                output = self._scheduler.absorb(sequence, made, offered)
            except RequestFailed as error:
                outputs.append(self._end_with(sequence, error))
                continue
            if output is not None and isinstance(made, tuple):
                self._counters.accepted.observe(len(made) - 1)
                self._counters.decode_tokens += len(output.tokens)
                if output.timing is not None and output.finish_reason is not None:
                    self._counters.served(output.timing.total_s - output.timing.queue_s)
                outputs.append((sequence, output))
        self._emit(outputs)
        return waited_s

    def _emit(self, outputs: list[tuple[Sequence, Delivery]]) -> None:
        """Deliver, one call per sink; forget the sequences that ended."""
        if not outputs:
            return
        by_sink: dict[int, tuple[Sink, list[Delivery]]] = {}
        ended = []
        for sequence, output in outputs:
            by_sink.setdefault(id(sequence.sink), (sequence.sink, []))[1].append(output)
            if sequence.phase is Phase.FINISHED:
                ended.append(sequence)
        if ended:
            self._forget(ended)
        for sink, batch in by_sink.values():
            _deliver(sink, batch)
        if ended:
            with self._wake:
                self._delivering = False
                self._wake.notify_all()

    def _forget(self, ended: list[Sequence]) -> None:
        """Their ids are free from now on: who has read a last output may use its id again at once."""
        with self._wake:
            for sequence in ended:
                self._live.pop(sequence.request.id, None)
                # A cancel that came too late must not hit the next user of the id.
                self._cancelled.discard(sequence.request.id)
            self._delivering = True

    def _fail(self, message: str) -> None:
        """The device or the code broke: tell everybody and take no more. Their requests may be replayed elsewhere."""
        with self._wake:
            self._failed = message
            waiting, self._live = list(self._live.values()), {}
            self._wake.notify_all()
        error: EngineError = EngineLost(message)
        for sequence in waiting:
            sequence.phase = Phase.FINISHED
            _deliver(sequence.sink, [RequestError(sequence.request.id, error)])


def _deliver(sink: Sink, batch: list[Delivery]) -> None:
    """A sink must not raise; if one does, that is a defect of its connection and the other connections go on."""
    try:
        sink.deliver(batch)
    except Exception:
        logger.exception("outputs of %d requests were lost: their sink failed", len(batch))
