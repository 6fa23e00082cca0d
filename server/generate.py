"""Engine requests → progress in text: one sequence, or several side by side. Knows no JSON, no HTTP, no API.

Closing a generator made here, or cancelling the task that reads it, closes the engine's iterators and so frees their
lanes.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import StrEnum
from time import perf_counter
from typing import cast

from ..engine import EngineClient, FinishReason, Request, StepOutput, Timing, TokenOutput
from .detokenize import Detokenizer
from .errors import Incomplete
from .keys import ACCOUNT
from .metrics import Metrics
from .watch import WATCH


class Ending(StrEnum):
    """Why a sequence ended, in TGI's words."""

    EOS = "eos_token"
    LENGTH = "length"
    STOP = "stop_sequence"

    @property
    def openai(self) -> str:
        """The same in OpenAI's words, which do not tell a stop string from an end of sequence."""
        return "length" if self is Ending.LENGTH else "stop"


@dataclass(frozen=True, slots=True)
class TextToken:
    """One generated token with its text."""

    id: int
    text: str
    """Empty while a character is incomplete; its bytes come with a later token."""
    special: bool
    """Never part of the answer's text: a special token, or the one that ended the sequence."""
    start: int
    """Where its text begins in the sequence's text, characters."""
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Done:
    """How a sequence ended."""

    ending: Ending
    text: str
    tokens: int
    cached_tokens: int
    timing: Timing | None
    mean_logprob: float
    """Of the tokens that carried one; 0 if none did."""
    stop: str | None = None
    """The stop string that ended it, if one did."""
    prompt: tuple[TokenOutput, ...] = ()
    """The prompt's tokens but the first, if their log-probabilities were asked for."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one turn of the engine brought to one sequence."""

    choice: int
    """Which of the sequences run together."""
    tokens: tuple[TextToken, ...]
    text: str
    """Text that became certain."""
    done: Done | None = None
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache."""
    prompt: tuple[TokenOutput, ...] = ()
    """With the first progress: the prompt's tokens but the first, if their log-probabilities were asked for."""


@dataclass(frozen=True, slots=True)
class Run:
    """One sequence to run: its engine request and where its text is put together."""

    request: Request
    text: Detokenizer
    scoring: bool = False
    """Only the prompt is of interest: the token that the engine makes after it is thrown away."""


async def run_one(
    engine: EngineClient, sequence: Run, metrics: Metrics, choice: int = 0
) -> AsyncGenerator[Progress, None]:
    """Run one sequence to its end. Raises the engine's errors, and Incomplete if the end never comes."""
    state = _Running(sequence, metrics, choice)
    request, watch = sequence.request, WATCH.get()
    if watch is not None:
        watch.started(request)
    try:
        steps = cast("AsyncGenerator[StepOutput, None]", engine.submit(request))
        async with aclosing(steps):
            async for step in steps:
                progress = state.advance(step)
                if (done := progress.done) is not None and watch is not None:
                    watch.ended(request, done.ending.openai, done.tokens, done.cached_tokens, done.timing)
                yield progress
                if done is not None:
                    return
        raise Incomplete("Incomplete generation")
    except Exception as error:
        if watch is not None:
            watch.failed(request, error)
        raise


async def run_all(
    engine: EngineClient, sequences: Sequence[Run], metrics: Metrics
) -> AsyncGenerator[Progress, None]:
    """Run several sequences side by side; what they bring comes as it arrives. The first failure ends all."""
    runs = [run_one(engine, sequence, metrics, choice) for choice, sequence in enumerate(sequences)]
    if len(runs) == 1:
        async with aclosing(runs[0]) as run:
            async for progress in run:
                yield progress
        return
    arrived: asyncio.Queue[Progress | Exception] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(run, arrived)) for run in runs]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            running -= item.done is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(
    engine: EngineClient, sequences: Sequence[Run], metrics: Metrics
) -> tuple[list[list[TextToken]], list[Done]]:
    """Run several sequences to their ends: the tokens and the end of each. Raises as `run_one` does."""
    tokens: list[list[TextToken]] = [[] for _ in sequences]
    ends: dict[int, Done] = {}
    async with aclosing(run_all(engine, sequences, metrics)) as arrived:
        async for progress in arrived:
            tokens[progress.choice] += progress.tokens
            if progress.done is not None:
                ends[progress.choice] = progress.done
    if len(ends) < len(sequences):
        raise Incomplete("Incomplete generation")
    return tokens, [ends[choice] for choice in range(len(sequences))]


async def _forward(
    run: AsyncGenerator[Progress, None], arrived: "asyncio.Queue[Progress | Exception]"
) -> None:
    async with aclosing(run):
        try:
            async for progress in run:
                arrived.put_nowait(progress)
        except Exception as error:
            arrived.put_nowait(error)


class _Running:
    """One sequence while it runs: engine steps in, progress out."""

    def __init__(self, sequence: Run, metrics: Metrics, choice: int) -> None:
        self._text = sequence.text
        self._choice = choice
        self._metrics = metrics
        self._cached = 0
        self._count = 0
        self._scored = 0
        self._logprobs = 0.0
        self._scoring = sequence.scoring
        self._started = False
        self._prompt: tuple[TokenOutput, ...] = ()
        self._account = ACCOUNT.get()
        self._prompt_tokens = len(sequence.request.prompt_ids)
        self._first: Timing | None = None
        """The engine's times up to the first token."""
        self._began = self._last = perf_counter()

    def advance(self, step: StepOutput) -> Progress:
        """Progress of one engine step. Raises Incomplete if the engine gave the sequence up."""
        durations = self._metrics.text_duration.decode if self._count else self._metrics.text_duration.prefill
        self._observe(step)
        tokens: list[TextToken] = []
        # An engine that takes over from one that died tells of the prompt once more.
        prompt = () if self._prompt else step.prompt
        self._prompt = self._prompt or prompt
        last = len(step.tokens) - 1
        for i, token in enumerate(() if self._scoring else step.tokens):
            ends = i == last and step.finish_reason is FinishReason.STOP
            start = self._text.length
            text = self._text.end(token.id) if ends else self._text.push(token.id)
            special = ends or self._text.special(token.id)
            tokens.append(TextToken(token.id, text, special, start, token.logprob, token.top))
            self._count += 1
            if token.logprob is not None:
                self._scored += 1
                self._logprobs += token.logprob
            if self._text.stopped:
                break
        progress = self._progress(tuple(tokens), prompt, step)
        if step.tokens:
            durations.observe(perf_counter() - self._last)
        return progress

    def _progress(
        self, tokens: tuple[TextToken, ...], prompt: tuple[TokenOutput, ...], step: StepOutput
    ) -> Progress:
        ending = self._ending(step.finish_reason)
        if ending is None:
            return Progress(self._choice, tokens, self._text.take(), None, self._cached, prompt)
        text = self._text.take() + self._text.finish()
        mean = self._logprobs / self._scored if self._scored else 0.0
        done = Done(
            ending=ending,
            text=self._text.text,
            tokens=self._count,
            cached_tokens=self._cached,
            timing=step.timing or self._timing(),
            mean_logprob=mean,
            stop=self._text.stop,
            prompt=self._prompt,
        )
        self._metrics.finished(done.tokens, done.timing)
        return Progress(self._choice, tokens, text, done, self._cached, prompt)

    def _timing(self) -> Timing | None:
        """Of a sequence that a stop string ended: the engine, which knows of none, was not at its end."""
        return None if self._first is None else replace(self._first, total_s=self._last - self._began)

    def _ending(self, reason: FinishReason | None) -> Ending | None:
        # A stop string wins over the engine's reason: it was complete before, or with, the engine's last token.
        if self._text.stopped:
            return Ending.STOP
        if reason is FinishReason.ABORT:
            raise Incomplete("The engine is stopping; the generation is incomplete")
        if reason is None:
            return None
        # What would have come after a prompt that was only scored says nothing about it.
        return Ending.EOS if reason is FinishReason.STOP and not self._scoring else Ending.LENGTH

    def _observe(self, step: StepOutput) -> None:
        if not step.tokens:
            return
        if self._account is not None:
            self._account.used(0 if self._started else self._prompt_tokens, len(step.tokens))
        self._started = True
        now = perf_counter()
        if self._count:
            self._metrics.inter_token.observe((now - self._last) / len(step.tokens), len(step.tokens))
        else:
            self._metrics.first_token.observe(now - self._last)
            self._cached, self._first = step.cached_tokens, step.timing
            self._metrics.cached_tokens += step.cached_tokens
        self._last = now
