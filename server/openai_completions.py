"""`POST /v1/completions`: prompts as text or token ids, several at once. Rules and running are elsewhere."""

import time
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .backend import Serving
from .body import read_body
from .errors import Invalid
from .front import Front, front_of
from .headers import Clock
from .openai_chunks import ID, Chunks, failure
from .openai_run import Answer, Finished, Job, Prompt, complete, plan, stream
from .openai_shapes import answer_headers, completion_logprobs, fingerprint, usage_of
from .prompts import given_ids, openai_ids
from .schema_openai import CompletionBody
from .stream import unless_gone
from .validate_openai import check_completion, check_length, check_model


async def completions(request: HttpRequest) -> Response:
    """`POST /v1/completions`."""
    body = await read_body(request, CompletionBody)
    front, clock = front_of(request), Clock()
    prompts = _prompts(body.prompt, front)
    choices = max(body.n or 1, body.best_of or 1)
    sequences = len(prompts) * max(1, min(choices, front.config.max_choices))
    if not body.stream:
        work = complete(front, sequences, lambda: _prepare(front, body, prompts, clock))
        return _answer(body, await unless_gone(request, work), clock)
    return stream(
        front,
        sequences,
        lambda: _prepare(front, body, prompts, clock),
        lambda job: _chunks(body, job),
        failure,
    )


def _prompts(prompt: str | list[str | int | list[int]], front: Front) -> list[str | list[int]]:
    """The prompts of a body, each a text or ids. Raises Invalid."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    if not prompt or len(prompt) not in (len(texts), len(lists)):
        raise Invalid("`prompt` must be texts, or token ids, and not empty", param="prompt")
    if len(prompt) > front.config.max_client_batch_size:
        raise Invalid(
            f"Number of prompts exceeds the maximum allowed batch size of {front.config.max_client_batch_size}. "
            f"Given: {len(prompt)}",
            param="prompt",
        )
    return [*texts, *lists]


async def _prepare(front: Front, body: CompletionBody, prompts: list[str | list[int]], clock: Clock) -> Job:
    serving = front.backend.serving()
    check_model(body.model, front.model_name, serving.info)
    checked = check_completion(body, front.config, serving.info, serving.tokenizer.eos_ids)
    ready = [await _prompt(front, serving, prompt, checked.max_tokens) for prompt in prompts]
    return plan(front, serving, ready, checked, clock)


async def _prompt(front: Front, serving: Serving, prompt: str | list[int], max_tokens: int | None) -> Prompt:
    if isinstance(prompt, str):
        text = prompt
        ids = await openai_ids(front, serving, prompt, "prompt", add_special_tokens=True)
    else:
        text, ids = "", given_ids(serving, prompt)
    return Prompt(text, ids, check_length(len(ids), max_tokens, serving.info, "prompt"))


def _chunks(body: CompletionBody, job: Job) -> Chunks:
    tokenizer = job.serving.tokenizer
    wanted = body.logprobs is not None
    return Chunks(
        job,
        chat=False,
        logprobs=(lambda tokens: completion_logprobs(tokenizer, tokens)) if wanted else None,
        usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _answer(body: CompletionBody, finished: Finished, clock: Clock) -> Response:
    job = finished.job
    answer = {
        "id": ID,
        "object": "text_completion",
        "created": int(time.time()),
        "model": job.model,
        "system_fingerprint": fingerprint(job.serving),
        "choices": [_choice(body, job, answer, i) for i, answer in enumerate(_kept(finished))],
        "usage": usage_of(finished),
    }
    return Response(orjson.dumps(answer), 200, answer_headers(finished, clock), "application/json")


def _kept(finished: Finished) -> list[Answer]:
    """The sequences to return: of each prompt the best by mean log-probability, or all in order."""
    checked = finished.job.checked
    kept: list[Answer] = []
    for start in range(0, len(finished.answers), checked.choices):
        group = finished.answers[start : start + checked.choices]
        if checked.keep < checked.choices:
            group.sort(key=lambda answer: answer.done.mean_logprob, reverse=True)
        kept += group[: checked.keep]
    return kept


def _choice(body: CompletionBody, job: Job, answer: Answer, index: int) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        logprobs = completion_logprobs(job.serving.tokenizer, answer.tokens)
    return {
        "index": index,
        "text": answer.text,
        "logprobs": logprobs,
        "finish_reason": answer.done.ending.openai,
    }
