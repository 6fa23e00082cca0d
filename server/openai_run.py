"""A request that passed all checks, and running its sequences, whole or streamed. Knows no bodies and no answer's shape."""

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from ..models.tokenizer import unmarked
from .backend import Serving
from .detokenize import Detokenizer
from .entry import Entry
from .errors import Invalid
from .front import Front
from .generate import Done, Progress, Run, TextToken, collect, run_all
from .headers import Clock, stream_headers
from .parting import Parting
from .reader import Call, Reader, whole
from .reasoning import visible
from .stream import KEEP_ALIVE, EventStream
from .validate import Checked, requests_of


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt that passed all checks."""

    text: str
    """As the model sees it; empty if the client sent ids."""
    ids: list[int]
    max_tokens: int
    """Tokens to generate after it; 0 if it is only to be scored."""
    thinking: bool = False
    """Whether it ends where the model's thinking has begun."""
    echo: str | None = None
    """What its answers begin with, if they begin with the prompt."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request that passed all checks: its prompts, and a sequence for each choice of each."""

    serving: Serving
    model: str
    """The served model's name in replies."""
    prompts: list[Prompt]
    checked: Checked
    runs: list[Run]
    parting: Parting

    @property
    def characters(self) -> int:
        """Of all prompts together, without the marks that are ours."""
        return sum(len(unmarked(prompt.text)) for prompt in self.prompts)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def legacy(self) -> bool:
        """Whether calls are told as `function_call`."""
        return self.parting.tools is not None and self.parting.tools.legacy

    def prompt_of(self, choice: int) -> Prompt:
        """The prompt of one of the sequences."""
        return self.prompts[choice // self.checked.choices]

    def readers(self) -> list[Reader]:
        """What parts thinking, text and calls, for each sequence."""
        return [
            self.parting.reader(prompt.text, prompt.thinking)
            for prompt in self.prompts
            for _ in range(self.checked.choices)
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    """One sequence at its end."""

    reasoning: str
    parts: list[str | Call]
    """The answer in order."""
    tokens: list[TextToken]
    """Those that make it up."""
    generated: Sequence[TextToken]
    """All of them: also what ended it, and what is not shown."""
    done: Done
    reasoning_tokens: int

    @property
    def text(self) -> str:
        """All of it that is text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[Call]:
        """All of it that is calls."""
        return [part for part in self.parts if isinstance(part, Call)]


@dataclass(frozen=True, slots=True)
class Finished:
    """All sequences of a job at their end."""

    job: Job
    answers: list[Answer]


class Emitter:
    """How one API tells a stream, as bytes ready to be sent. Made when the job is ready."""

    def of(self, progress: Progress) -> bytes:
        """What to send for this progress; empty while its text is held back."""
        raise NotImplementedError

    def end(self) -> bytes:
        """What to send when all sequences have ended."""
        raise NotImplementedError

    def failed(self, error: Exception) -> bytes:
        """What to send instead of the rest."""
        raise NotImplementedError

    def keep_alive(self) -> bytes:
        """What to send in a long silence."""
        return KEEP_ALIVE


def plan(
    front: Front,
    parting: Parting,
    prompts: list[Prompt],
    checked: Checked,
    clock: Clock,
) -> Job:
    """A job of checked prompts; counts it. Its answers are parted as `parting` says."""
    serving, kept = parting.serving, parting.kept_ids
    runs = [
        Run(
            request,
            Detokenizer(
                serving.tokenizer,
                prompt.ids,
                checked.stops,
                include_stop=checked.include_stop,
                kept_ids=kept,
                min_tokens=checked.sampling.min_tokens,
            ),
            scoring=prompt.max_tokens == 0,
        )
        for prompt in prompts
        for request in requests_of(checked, prompt.ids, max(1, prompt.max_tokens))
    ]
    if len(runs) > (most := serving.info.lanes + serving.info.max_queued):
        raise Invalid(
            f"{len(runs)} sequences in one request, and at most {most} have room in the engine (lanes and --max-queued): ask for fewer"
        )
    for prompt in prompts:
        front.metrics.input_length.observe(len(prompt.ids))
        front.metrics.max_new_tokens.observe(prompt.max_tokens)
    front.metrics.validation_duration.observe(clock.submitted())
    # Not `front.model_name`: a server that is asked to stop meanwhile still answers what it has begun.
    model = checked.terms.adapter or front.config.served_model_name or serving.info.model_id
    return Job(serving, model, prompts, checked, runs, parting)


async def complete(
    front: Front,
    sequences: int,
    prepare: Callable[[], Coroutine[Any, Any, Job]],
    answer: Callable[[Finished], Response],
) -> Response:
    """Prepare a job, run it to its end, holding a permit per sequence, and answer. What has no answer was no success."""
    with front.metrics.request():
        with front.permits.take(sequences):
            job = await prepare()
            tokens, ends = await collect(job.serving.engine, job.runs, front.metrics)
        parts = zip(job.readers(), tokens, ends, strict=True)
        finished = Finished(job, [answer_of(*each) for each in parts])
        if job.checked.prompt_logprobs is None:
            return answer(finished)
        # The scores of a long prompt take so long to write that no stream should wait for it.
        return await front.workers.run(answer, finished)


def answer_of(reader: Reader, tokens: Sequence[TextToken], done: Done) -> Answer:
    """A sequence that has ended, with its thinking and its calls parted."""
    reasoning, pieces = reader.of(Progress(0, tuple(tokens), done.text, done))
    return Answer(
        reasoning, whole(pieces), visible(tokens, reader.span), tokens, done, reader.reasoning_tokens
    )


def stream(
    entry: Entry,
    sequences: int,
    prepare: Callable[[Front], Coroutine[Any, Any, Job]],
    emitter_of: Callable[[Job], Emitter],
    error_event: Callable[[Exception], bytes],
) -> EventStream:
    """The response that prepares a job and streams it. `error_event` tells what fails before there is an emitter."""
    headers: dict[str, str] = {}
    made: list[Emitter] = []

    async def events() -> AsyncGenerator[bytes, None]:
        front = await entry.patiently()
        with front.metrics.request(), front.permits.take(sequences):
            job = await prepare(front)
            headers.update(stream_headers(job.serving, job.characters))
            emitter = emitter_of(job)
            made.append(emitter)
            async with aclosing(run_all(job.serving.engine, job.runs, front.metrics)) as arrived:
                async for progress in arrived:
                    # The scores of a long prompt take so long to write that no other stream should wait for it.
                    work = front.workers.run(emitter.of, progress) if progress.prompt else None
                    if chunk := emitter.of(progress) if work is None else await work:
                        yield chunk
            yield emitter.end()

    return EventStream(
        events(),
        extra_headers=headers,
        error_event=lambda error: made[0].failed(error) if made else error_event(error),
        keep_alive=lambda: made[0].keep_alive() if made else KEEP_ALIVE,
        keep_alive_s=entry.config.sse_keep_alive_s,
        waits=entry.told,
    )
