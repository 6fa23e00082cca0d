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
from .headers import Clock, full_headers
from .openai_chunks import ID, Chunks
from .openai_run import Finished, Job, Prompt, complete, plan, stream
from .openai_shapes import completion_logprobs, fingerprint, visible
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
        return _answer(front, body, await unless_gone(request, work), clock)
    return stream(
        front,
        sequences,
        lambda: _prepare(front, body, prompts, clock),
        lambda job: _chunks(front, body, job),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
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


def _chunks(front: Front, body: CompletionBody, job: Job) -> Chunks:
    tokenizer = job.serving.tokenizer
    wanted = body.logprobs is not None
    return Chunks(
        job.serving,
        front.model_name,
        chat=False,
        choices=len(job.runs),
        logprobs=(lambda tokens: completion_logprobs(tokenizer, tokens)) if wanted else None,
    )


def _answer(front: Front, body: CompletionBody, finished: Finished, clock: Clock) -> Response:
    job, ends = finished.job, finished.ends
    used = job.usage(ends)
    answer = {
        "id": ID,
        "object": "text_completion",
        "created": int(time.time()),
        "model": front.config.served_model_name or job.serving.info.model_id,
        "system_fingerprint": fingerprint(job.serving),
        "choices": [_choice(body, finished, i, run) for i, run in enumerate(_kept(finished))],
        "usage": used,
    }
    timings = [done.timing for done in ends.values()]
    headers = full_headers(
        job.serving, job.text, clock, timings, job.prompt_tokens, used["completion_tokens"]
    )
    return Response(orjson.dumps(answer), 200, headers, "application/json")


def _kept(finished: Finished) -> list[int]:
    """The sequences to return: of each prompt the best by mean log-probability, or all in order."""
    checked = finished.job.checked
    kept: list[int] = []
    for start in range(0, len(finished.job.runs), checked.choices):
        group = list(range(start, start + checked.choices))
        if checked.keep < checked.choices:
            group.sort(key=lambda i: finished.ends[i].mean_logprob, reverse=True)
        kept += group[: checked.keep]
    return kept


def _choice(body: CompletionBody, finished: Finished, index: int, run: int) -> dict[str, Any]:
    done = finished.ends[run]
    logprobs = None
    if body.logprobs is not None:
        shown = visible(finished.tokens[run], len(done.text))
        logprobs = completion_logprobs(finished.job.serving.tokenizer, shown)
    return {"index": index, "text": done.text, "logprobs": logprobs, "finish_reason": done.ending.openai}
