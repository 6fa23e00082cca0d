"""An engine with hand arithmetic: one token a turn for each running request, every token known beforehand.

`python -m tests.support.fake_core --uds PATH --progress-fd N` serves it as a process of its own, as `xlane engine` would.

Satisfies `xlane.engine.local.EngineCore`. The next token depends on the prompt, the seed and the position alone, so an
interrupted stream must equal an undisturbed one. Special tokens in a prompt make it misbehave on purpose. Biases, least
lengths and a prompt's log-probabilities come out as in `arithmetic`.
"""

import argparse
import asyncio
import os
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xlane.engine import (
    DeadlineExceeded,
    EngineError,
    EngineInfo,
    EngineStats,
    EngineStopped,
    FinishReason,
    Histogram,
    InvalidRequest,
    LaunchStats,
    Overloaded,
    Request,
    RequestFailed,
    StepOutput,
    Timing,
    TokenOutput,
)
from xlane.engine.local import Delivery, RequestError, Sink
from xlane.engine.process import ParentLink
from xlane.engine.rpc_server import serve

from .arithmetic import choose, prompt_outputs

VOCAB_SIZE = 1000
MAX_TOTAL_TOKENS = 4096
PAGES = 1024
"""None of which is ever taken."""
FAIL_TOKEN = 901
"""In a prompt: RequestFailed instead of the third token."""
KILL_TOKEN = 902
"""In a prompt: the engine's process dies by SIGKILL instead of computing the third token."""
NO_LAUNCHES = LaunchStats(*[Histogram((0,) * 36, 0.0)] * 3)
KILL_AT_ONCE_TOKEN = 903
"""In a prompt: the engine's process dies when the request is admitted."""


def token_at(request: Request, position: int) -> TokenOutput:
    """The token at `position` of the output, by arithmetic."""
    mixed = sum(request.prompt_ids) * 31 + len(request.prompt_ids) * 17 + request.sampling.seed * 7919
    preferred = (mixed + position * position * 13 + position * 101) % 900
    token_id = choose(request, preferred, position, VOCAB_SIZE)
    if not request.sampling.logprobs:
        return TokenOutput(token_id)
    top = tuple(((token_id + i) % 900, -(position + 1 + i) / 8) for i in range(request.sampling.top_logprobs))
    return TokenOutput(token_id, -(position + 1) / 8, top)


def expected_ids(request: Request) -> list[int]:
    """The whole output of an undisturbed run."""
    ids: list[int] = []
    while len(ids) < request.sampling.max_tokens:
        ids.append(token_at(request, len(ids)).id)
        if ids[-1] in request.sampling.stop_ids:
            break
    return ids


@dataclass
class _Running:
    request: Request
    sink: Sink
    position: int
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    cancelled: bool = False

    def timing(self) -> Timing:
        now = time.monotonic()
        return Timing(
            queue_s=(self.admitted or now) - self.submitted,
            first_token_s=(self.first_token or now) - self.submitted,
            total_s=now - self.submitted,
        )


class FakeCore:
    """See the module. `turn_s` is the pause between turns; `freeze` stops the turns, as a very slow device would. `says`
    takes the place of what it would say of itself."""

    def __init__(self, *, lanes: int = 8, max_queued: int = 64, turn_s: float = 0.001, **says: Any) -> None:
        self._says = says
        self._lanes, self._max_queued, self._turn_s = lanes, max_queued, turn_s
        self._changed = threading.Condition()
        self._requests: dict[str, _Running] = {}  # in order of arrival; the first `lanes` of them run
        self._steps = self._decode_tokens = self._prefill_tokens = 0
        self._draining = self._stopping = self._frozen = False
        self.hangs_at: int | None = None
        """The number of the token at which the device hangs."""
        self.sick = False
        self.broken = False
        self.adapters: dict[str, str] = {"named": "0"}
        """Name and digest, which is the content of the folder."""
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        info = EngineInfo(
            model_id="fake",
            model_sha=None,
            dtype="float32",
            platform="cpu",
            device_kind="arithmetic",
            device_count=1,
            vocab_size=VOCAB_SIZE,
            max_total_tokens=MAX_TOTAL_TOKENS,
            max_input_tokens=MAX_TOTAL_TOKENS - 1,
            lanes=self._lanes,
            pages=PAGES,
            page_tokens=32,
            max_queued=self._max_queued,
            kernels="none: arithmetic",
            version="0",
            adapters=tuple(self.adapters),
        )
        return replace(info, **self._says)

    def load_adapter(self, name: str, folder: str, digest: str = "") -> str:
        if self.adapters.get(name) == digest:
            return digest
        try:
            found = Path(folder, "weights").read_text()
        except OSError as error:
            raise InvalidRequest(f"{folder} has no weights") from error
        if digest not in ("", found):
            raise InvalidRequest(f"{folder} has other weights")
        self.adapters[name] = found
        return found

    def unload_adapter(self, name: str) -> None:
        if self.adapters.pop(name, None) is None:
            raise InvalidRequest(f"there is no adapter {name!r}")

    def submit(self, request: Request, sink: Sink) -> None:
        with self._changed:
            if self._draining or self._stopping:
                raise EngineStopped("the engine is draining")
            self._validate(request)
            if len(self._requests) >= self._lanes + self._max_queued:
                raise Overloaded(f"{self._max_queued} requests are waiting already", retry_after_s=0.25)
            self._requests[request.id] = _Running(request, sink, position=len(request.resume_ids))
            self._changed.notify_all()

    def _validate(self, request: Request) -> None:
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in the engine")
        if request.adapter and request.adapter not in self.adapters:
            raise InvalidRequest(f"there is no adapter {request.adapter!r}")
        if not request.prompt_ids:
            raise InvalidRequest("the prompt is empty")
        if (largest := max(request.prompt_ids)) >= VOCAB_SIZE:
            raise InvalidRequest(f"token {largest} is outside the vocabulary of {VOCAB_SIZE}")
        if (total := len(request.prompt_ids) + request.sampling.max_tokens) > MAX_TOTAL_TOKENS:
            raise InvalidRequest(f"{total} tokens are more than {MAX_TOTAL_TOKENS}")

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._requests:
                self._requests[request_id].cancelled = True
            self._changed.notify_all()

    def stats(self) -> EngineStats:
        with self._changed:
            running = len(self._requests)
            return EngineStats(
                lanes_active=min(running, self._lanes),
                queued=max(0, running - self._lanes),
                pages_free=0,
                pages_remembered=0,
                pages_total=0,
                steps=self._steps,
                prefill_tokens=self._prefill_tokens,
                decode_tokens=self._decode_tokens,
                preemptions=0,
                compiles_after_ready=0,
                step_ms=self._turn_s * 1000,
                queue_wait_s=0.0,
                host_ms=0.5,
                gap_ms=0.0,
                prefill=NO_LAUNCHES,
                decode=NO_LAUNCHES,
                prefill_rows=Histogram((0,) * 12, 0.0),
                joins=0,
                guessed_tokens=0,
                accepted=Histogram((0,) * 17, 0.0),
            )

    def healthy(self) -> bool:
        return self._thread.is_alive() and not (self.sick or self._stopping or self._draining)

    def alive(self) -> bool:
        return self._thread.is_alive() and not self.broken

    def drain(self, timeout_s: float) -> None:
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._requests, timeout_s)
            for running in self._requests.values():
                running.cancelled = True
            self._frozen = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._requests or not self._thread.is_alive(), 5)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(5)

    def freeze(self, frozen: bool = True) -> None:
        """Stop or go on with the turns."""
        with self._changed:
            self._frozen = frozen
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                stopping = self._stopping
                batches = self._turn()
                self._changed.notify_all()
            for sink, batch in batches.items():
                sink.deliver(batch)
            if stopping:
                return
            time.sleep(self._turn_s)

    def _has_work(self) -> bool:
        if self._stopping:
            return True
        wanted = self._requests.values()
        return any(r.cancelled for r in wanted) if self._frozen else bool(wanted)

    def _turn(self) -> dict[Sink, list[Delivery]]:
        """One turn; what it made for each sink."""
        self._steps += 1
        batches: dict[Sink, list[Delivery]] = {}
        for lane, (request_id, running) in enumerate(list(self._requests.items())):
            made = self._advance(running, has_lane=lane < self._lanes and not self._frozen)
            if made is None:
                continue
            batches.setdefault(running.sink, []).append(made)
            if isinstance(made, RequestError) or made.finish_reason is not None:
                del self._requests[request_id]
        return batches

    def _advance(self, running: _Running, *, has_lane: bool) -> Delivery | None:
        request = running.request
        if running.cancelled or self._stopping:
            return StepOutput(request.id, (), FinishReason.ABORT, timing=running.timing())
        if request.deadline_s is not None and time.monotonic() - running.submitted > request.deadline_s:
            return RequestError(request.id, DeadlineExceeded(f"not done in {request.deadline_s} s"))
        if not has_lane:
            return None
        if (error := self._misbehave(running)) is not None:
            return RequestError(request.id, error)
        return self._emit(running)

    def _misbehave(self, running: _Running) -> EngineError | None:
        prompt = running.request.prompt_ids
        if KILL_AT_ONCE_TOKEN in prompt or (KILL_TOKEN in prompt and running.position == 2):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.hangs_at is not None and running.position >= self.hangs_at:
            self.broken = True
            threading.Event().wait()
        if FAIL_TOKEN in prompt and running.position == 2:
            return RequestFailed(f"token {FAIL_TOKEN} was met")
        return None

    def _emit(self, running: _Running) -> StepOutput:
        request = running.request
        first = running.admitted is None
        if first:
            running.admitted = running.first_token = time.monotonic()
            self._prefill_tokens += len(request.prompt_ids)
        token = token_at(request, running.position)
        running.position += 1
        self._decode_tokens += 1
        finish = None
        if token.id in request.sampling.stop_ids:
            finish = FinishReason.STOP
        elif running.position >= request.sampling.max_tokens:
            finish = FinishReason.LENGTH
        return StepOutput(
            request.id,
            (token,),
            finish,
            cached_tokens=len(request.prompt_ids) // 4 if first else 0,
            timing=running.timing() if first or finish else None,
            prompt=prompt_outputs(request, VOCAB_SIZE) if first else (),
        )


def _turn_in_a_circle(*_: object) -> None:
    """In the thread that signals come to, which is the event loop's."""
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turn-s", type=float, default=0.002)
    parser.add_argument("--drain-s", type=float, default=5.0)
    parser.add_argument(
        "--hang-once", help="a file: whoever finds it takes it away, and hangs at the third token"
    )
    parser.add_argument("--uds", required=True)
    parser.add_argument("--progress-fd", type=int, required=True)
    arguments = parser.parse_args()
    link = ParentLink(arguments.progress_fd)
    link.die_with_parent()
    link.report("weights", 1, 2)
    signal.signal(signal.SIGUSR1, _turn_in_a_circle)
    core = FakeCore(turn_s=arguments.turn_s)
    if arguments.hang_once and os.path.exists(arguments.hang_once):
        os.unlink(arguments.hang_once)
        core.hangs_at = 2
    address = f"unix:{arguments.uds}"
    asyncio.run(serve(core, address, drain_s=arguments.drain_s, on_ready=lambda address: link.ready()))


if __name__ == "__main__":
    main()
