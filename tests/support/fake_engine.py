"""An engine whose arithmetic a person can do by hand, behind `EngineClient`. No device, no model, no jax.

Greedy, the next token is the next letter of the alphabet: after "…c" comes "d", after "z" comes "a", after anything
else "a". Sampled, letters advance by 1 + seed % 5 instead of 1. Token number i (from 0) has log-probability
-(i + 1) / 8 greedy, and -(step) / 8 sampled, so a smaller step is a better sequence. With `reply` set, its bytes are
generated instead, then the first stop id. Biases, least lengths and a prompt's log-probabilities come out as in
`arithmetic`.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from xlane.engine import (
    DeadlineExceeded,
    EngineInfo,
    EngineStats,
    FinishReason,
    Histogram,
    InvalidRequest,
    LaneStats,
    LaunchStats,
    Request,
    StepOutput,
    Timing,
    TokenOutput,
)

from .arithmetic import choose, prompt_outputs
from .byte_tokenizer import EOS, VOCAB_SIZE
from .obedient import obedient_ids

LETTERS = range(ord("a"), ord("z") + 1)


SLOTS = 3
"""Most adapters at once."""


def fake_info(max_total_tokens: int = 512, max_input_tokens: int = 400) -> EngineInfo:
    """What the fake engine says of itself."""
    return EngineInfo(
        model_id="fake/alphabet",
        model_sha=None,
        dtype="float32",
        platform="cpu",
        device_kind="fake",
        device_count=1,
        vocab_size=VOCAB_SIZE,
        max_total_tokens=max_total_tokens,
        max_input_tokens=max_input_tokens,
        lanes=8,
        pages=64,
        page_tokens=32,
        max_queued=128,
        kernels="none",
        version="0.0",
    )


def next_letter(token: int, step: int = 1) -> int:
    """The letter `step` places on; "a" after anything that is no letter."""
    if token not in LETTERS:
        return LETTERS[0]
    return LETTERS[(token - LETTERS[0] + step) % len(LETTERS)]


def spread(*counts: int, edges: int, sum: float) -> Histogram:
    """So many values in the first buckets, none in the others."""
    return Histogram((*counts, *[0] * (edges + 1 - len(counts))), sum)


@dataclass
class FakeEngine:
    """Set the fields before a request; read the lists after it."""

    info_value: EngineInfo = field(default_factory=fake_info)
    reply: str | None = None
    """Generate this text, then end of sequence."""
    obeys: bool = False
    """Whether a request's grammar is followed instead, as `obedient.py` says."""
    first_delay_s: float = 0.0
    delay_s: float = 0.0
    """Before each later step."""
    tokens_per_step: int = 1
    cached_tokens: int = 0
    refuse_with: Exception | None = None
    """Raised instead of the first step."""
    fail_with: Exception | None = None
    fail_after: int = 3
    """Tokens before `fail_with` is raised."""
    abort_after: int | None = None
    """Tokens before the engine gives a sequence up."""
    healthy: bool = True

    submitted: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Ids of requests whose iterator was closed before its end."""
    loaded: list[tuple[str, str]] = field(default_factory=list)
    """Name and folder of adapters."""
    active: int = 0
    lanes: dict[int, LaneStats] = field(default_factory=dict)
    """What runs, by lane: the first that is free. A token of the prompt is computed, or found, before its first output."""

    async def submit(self, request: Request) -> AsyncIterator[StepOutput]:  # type: ignore[override]
        if self.refuse_with is not None:
            raise self.refuse_with
        if max(request.prompt_ids) >= self.info_value.vocab_size:
            raise InvalidRequest("an id is out of range")
        self.submitted.append(request)
        self.active += 1
        lane = next(number for number in itertools.count() if number not in self.lanes)
        self._show(lane, request, generated=0)
        finished = False
        started = time.monotonic()
        try:
            tokens, reason = self._tokens(request)
            for start in range(0, len(tokens), self.tokens_per_step):
                await asyncio.sleep(self.first_delay_s if start == 0 else self.delay_s)
                if request.deadline_s is not None and time.monotonic() - started > request.deadline_s:
                    raise DeadlineExceeded(f"deadline of {request.deadline_s:g} s passed")
                if self.fail_with is not None and start >= self.fail_after:
                    raise self.fail_with
                end = start + self.tokens_per_step
                aborts = self.abort_after is not None and end >= self.abort_after
                finished = end >= len(tokens) or aborts
                self._show(lane, request, generated=end)
                yield StepOutput(
                    request.id,
                    tuple(tokens[start:end]),
                    (FinishReason.ABORT if aborts else reason) if finished else None,
                    self.cached_tokens,
                    Timing(0.001, 0.002, 0.003 if finished else 0.002) if finished or start == 0 else None,
                    prompt_outputs(request, self.info_value.vocab_size) if start == 0 else (),
                )
        finally:
            self.active -= 1
            del self.lanes[lane]
            if not finished:
                self.cancelled.append(request.id)

    def _show(self, lane: int, request: Request, generated: int) -> None:
        prompt = len(request.prompt_ids)
        self.lanes[lane] = LaneStats(
            lane=lane,
            prefill=generated == 0,
            prompt_tokens=prompt,
            cached_tokens=self.cached_tokens,
            generated_tokens=generated,
            computed_tokens=prompt + generated - 1 if generated else prompt // 2,
            most_tokens=prompt + request.sampling.max_tokens,
            pages=1,
            age_s=generated / 8,
        )

    def _tokens(self, request: Request) -> tuple[list[TokenOutput], FinishReason]:
        sampling = request.sampling
        greedy = sampling.temperature == 0.0
        step = 1 if greedy else 1 + sampling.seed % 5
        ids, reason = self._ids(request, step)
        return [
            self._output(request, token, -((i + 1) if greedy else step) / 8) for i, token in enumerate(ids)
        ], reason

    def _ids(self, request: Request, step: int) -> tuple[list[int], FinishReason]:
        sampling, vocab = request.sampling, self.info_value.vocab_size
        if self.obeys and request.grammar is not None:
            ids = obedient_ids(request.grammar, sampling.max_tokens)
            return ids, FinishReason.STOP if ids[-1] == EOS else FinishReason.LENGTH
        reply = None if self.reply is None else self.reply.encode()
        ids: list[int] = []
        token = request.prompt_ids[-1]
        while len(ids) < sampling.max_tokens:
            if reply is None:
                preferred = next_letter(token, step)
            elif len(ids) < len(reply):
                preferred = reply[len(ids)]
            elif sampling.stop_ids:
                preferred = sampling.stop_ids[0]
            else:
                break
            token = choose(request, preferred, len(ids), vocab)
            ids.append(token)
            if token in sampling.stop_ids:
                return ids, FinishReason.STOP
        return ids, FinishReason.LENGTH

    def _output(self, request: Request, token: int, logprob: float) -> TokenOutput:
        if not request.sampling.logprobs:
            return TokenOutput(token)
        top = tuple(((token + i) % 256, logprob - i) for i in range(request.sampling.top_logprobs))
        return TokenOutput(token, logprob, top)

    async def info(self) -> EngineInfo:
        return self.info_value

    async def load_adapter(self, name: str, folder: str) -> None:
        """Of what the folder holds nothing is asked."""
        if len(self.info_value.adapters) == SLOTS:
            raise InvalidRequest("no slot is free")
        self.info_value = replace(self.info_value, adapters=(*self.info_value.adapters, name))
        self.loaded.append((name, folder))

    async def unload_adapter(self, name: str) -> None:
        left = tuple(there for there in self.info_value.adapters if there != name)
        self.info_value = replace(self.info_value, adapters=left)

    async def stats(self) -> EngineStats:
        return EngineStats(
            lanes_active=self.active,
            queued=0,
            pages_free=60,
            pages_remembered=6,
            pages_total=64,
            steps=7,
            prefill_tokens=11,
            decode_tokens=13,
            preemptions=0,
            compiles_after_ready=0,
            step_ms=2.0,
            queue_wait_s=0.25,
            host_ms=0.125,
            gap_ms=0.0625,
            prefill=LaunchStats(*(spread(1, edges=35, sum=each / 8) for each in (1, 2, 3))),
            decode=LaunchStats(*(spread(2, 5, edges=35, sum=float(each)) for each in (4, 5, 6))),
            prefill_rows=spread(0, 1, edges=11, sum=2.0),
            joins=3,
            guessed_tokens=20,
            accepted=spread(0, 0, 1, 4, edges=16, sum=14.0),
            taken_lanes=tuple(self.lanes[lane] for lane in sorted(self.lanes)),
        )

    async def health(self) -> bool:
        return self.healthy

    async def drain(self, timeout_s: float) -> None:
        pass

    async def close(self) -> None:
        pass
