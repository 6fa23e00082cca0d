"""What chat and completions do alike: run the sequences of one or more prompts, whole or streamed. Knows no bodies."""

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from .backend import Serving
from .detokenize import Detokenizer
from .errors import problem_of
from .front import Front
from .generate import Done, Run, TextToken, collect, run_all
from .headers import Clock, stream_headers
from .openai_chunks import Chunks
from .openai_shapes import usage
from .stream import DONE, EventStream, event
from .validate import Checked, requests_of


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt that passed all checks."""

    text: str
    """As the model sees it; empty if the client sent ids."""
    ids: list[int]
    max_tokens: int
    """Tokens to generate after it."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request that passed all checks: its prompts, and a sequence for each choice of each."""

    serving: Serving
    prompts: list[Prompt]
    checked: Checked
    runs: list[Run]

    @property
    def text(self) -> str:
        """All prompts together, for the count of characters."""
        return "".join(prompt.text for prompt in self.prompts)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    def usage(self, ends: dict[int, Done]) -> dict[str, Any]:
        """The request's `usage`."""
        return usage((len(prompt.ids) for prompt in self.prompts), self.checked.choices, ends)


@dataclass(frozen=True, slots=True)
class Finished:
    """All sequences of a job at their end."""

    job: Job
    tokens: list[list[TextToken]]
    ends: dict[int, Done]


def plan(front: Front, serving: Serving, prompts: list[Prompt], checked: Checked, clock: Clock) -> Job:
    """A job of checked prompts; counts it."""
    runs = [
        Run(request, Detokenizer(serving.tokenizer, prompt.ids, checked.stops))
        for prompt in prompts
        for request in requests_of(checked, prompt.ids, prompt.max_tokens)
    ]
    for prompt in prompts:
        front.metrics.input_length.observe(len(prompt.ids))
        front.metrics.max_new_tokens.observe(prompt.max_tokens)
    front.metrics.validation_duration.observe(clock.submitted())
    return Job(serving, prompts, checked, runs)


async def complete(front: Front, sequences: int, prepare: Callable[[], Coroutine[Any, Any, Job]]) -> Finished:
    """Prepare a job and run it to its end, holding a permit per sequence."""
    with front.metrics.request(), front.permits.take(sequences):
        job = await prepare()
        tokens, ends = await collect(job.serving.engine, job.runs, front.metrics)
        return Finished(job, tokens, dict(enumerate(ends)))


def stream(
    front: Front,
    sequences: int,
    prepare: Callable[[], Coroutine[Any, Any, Job]],
    chunks_of: Callable[[Job], Chunks],
    *,
    include_usage: bool,
) -> EventStream:
    """The response that prepares a job and streams it."""
    headers: dict[str, str] = {}

    async def events() -> AsyncGenerator[bytes, None]:
        with front.metrics.request(), front.permits.take(sequences):
            job = await prepare()
            headers.update(stream_headers(job.serving, job.text))
            chunks = chunks_of(job)
            ends: dict[int, Done] = {}
            async with aclosing(run_all(job.serving.engine, job.runs, front.metrics)) as arrived:
                async for progress in arrived:
                    if progress.done is not None:
                        ends[progress.choice] = progress.done
                    if chunk := chunks.of(progress):
                        yield chunk
            yield (chunks.usage(job.usage(ends)) if include_usage else b"") + DONE

    return EventStream(
        events(),
        extra_headers=headers,
        error_event=lambda error: event(problem_of(error).openai()) + DONE,
        keep_alive_s=front.config.sse_keep_alive_s,
        write_timeout_s=front.config.write_timeout_s,
    )
