"""Several independent generations asked for in one body, for the platforms that batch: all of them answer, or none.

Knows native bodies and chats as values; not in which JSON a platform wraps them. Permits for all are taken at once, and
one bad instance refuses the request, named by its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import native, openai_chat
from .errors import Invalid, NoSuchModel, ServerError, TemplateFailed
from .front import Front
from .generate import Done, TextToken, collect
from .headers import Clock
from .openai_run import answer_of
from .schema_openai import ChatBody
from .schema_tgi import GenerateBody

Instance = GenerateBody | ChatBody


@dataclass(frozen=True, slots=True)
class _Result:
    tokens: list[list[TextToken]]
    ends: list[Done]


async def generate_all(
    front: Front, instances: Sequence[Instance], clock: Clock
) -> list[str | dict[str, Any]]:
    """A text for each instance; for a native one with `details` the object `/generate` answers.

    Raises what their own routes raise.
    """
    permits = sum(_sequences(front, instance) for instance in instances)
    with front.metrics.request():
        with front.permits.take(permits):
            jobs = [await _prepared(front, i, instance, clock) for i, instance in enumerate(instances)]
            runs = [run for job in jobs for run in job.runs]
            tokens, ends = await collect(jobs[0].serving.engine, runs, front.metrics)
        answers: list[str | dict[str, Any]] = []
        for job in jobs:
            count = len(job.runs)
            answers.append(_answer(job, _Result(tokens[:count], ends[:count])))
            tokens, ends = tokens[count:], ends[count:]
        return answers


def _sequences(front: Front, instance: Instance) -> int:
    if isinstance(instance, GenerateBody):
        return native.sequences_of(instance, front)
    return openai_chat.sequences_of(instance, front.config)


async def _prepared(
    front: Front, index: int, instance: Instance, clock: Clock
) -> native.Job | openai_chat.Job:
    try:
        if instance.stream:
            raise Invalid("`stream` is not possible here: all instances are answered at once", param="stream")
        if isinstance(instance, GenerateBody):
            return await native.prepare(front, instance, clock, streaming=False, full_text=False)
        if instance.n not in (None, 1):
            raise Invalid("`n` must be 1: an instance has one answer", param="n")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(instance, name) is not None and getattr(instance, name) is not False:
                raise Invalid(f"`{name}` is not possible here: a chat's answer is its text", param=name)
        return await openai_chat.prepare(front, instance, clock)
    except (Invalid, NoSuchModel, TemplateFailed) as error:
        raise _placed(error, index) from error


def _placed(error: ServerError, index: int) -> ServerError:
    """The same error, saying which instance it is about."""
    return type(error)(f"instance {index}: {error}", param=error.param, code=error.code)


def _answer(job: native.Job | openai_chat.Job, result: _Result) -> str | dict[str, Any]:
    if isinstance(job, native.Job):
        answer = native.answer_of(job, result.tokens, result.ends)
        return answer if job.details else answer["generated_text"]
    (done,) = result.ends
    answer = answer_of(job.readers()[0], result.tokens[0], done)
    # A prediction is a text; what calls tools is told as the model wrote it.
    return done.text if answer.calls else answer.text
