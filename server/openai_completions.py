"""`POST /v1/completions`: prompts as text or token ids, several at once. Rules and running are elsewhere."""

import time
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .backend import Serving
from .body import read_body
from .config import ServerConfig
from .entry import Entry
from .errors import Invalid
from .front import Front, permits_for
from .guide import grammar_of
from .headers import Clock
from .openai_chunks import ID, Chunks, failure
from .openai_run import Answer, Finished, Job, Prompt, complete, plan, stream
from .openai_shapes import answer_headers, completion_logprobs, fingerprint, prompt_logprobs, usage_of
from .parting import Parting
from .prompt_scores import moved, prompt_tokens
from .prompts import given_ids, openai_ids
from .schema_openai import CompletionBody
from .stream import unless_gone
from .validate import with_adapter
from .validate_openai import check_completion, check_length, check_model


async def completions(request: HttpRequest) -> Response:
    """`POST /v1/completions`."""
    body = await read_body(request, CompletionBody)
    entry = Entry(request, body.model)
    prompts = prompts_of(body.prompt, entry.config)
    choices = max(body.n or 1, body.best_of or 1)
    sequences = len(prompts) * permits_for(choices, entry.config.max_choices)
    if not body.stream:
        front, clock = await entry.front(), Clock()
        work = complete(
            front,
            sequences,
            lambda: prepare(front, body, prompts, clock),
            lambda finished: _answer(body, finished, clock),
        )
        return await unless_gone(request, work)
    return stream(
        entry,
        sequences,
        lambda front: prepare(front, body, prompts, Clock()),
        lambda job: _chunks(body, job),
        failure,
    )


def prompts_of(prompt: str | list[str | int | list[int]], config: ServerConfig) -> list[str | list[int]]:
    """The prompts of a body, each a text or ids. Raises Invalid."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    if not prompt or len(prompt) not in (len(texts), len(lists)):
        raise Invalid("`prompt` must be texts, or token ids, and not empty", param="prompt")
    if len(prompt) > config.max_client_batch_size:
        raise Invalid(
            f"Number of prompts exceeds the maximum allowed batch size of {config.max_client_batch_size}. "
            f"Given: {len(prompt)}",
            param="prompt",
        )
    return [*texts, *lists]


async def prepare(front: Front, body: CompletionBody, prompts: list[str | list[int]], clock: Clock) -> Job:
    """Check and tokenise; counts it. Raises NotReady, NoSuchModel, Invalid, Unsupported."""
    serving = front.backend.serving()
    adapter = check_model(body.model, front.model_name, serving.info)
    checked = with_adapter(
        check_completion(body, front.config, serving.info, serving.tokenizer.eos_ids), adapter
    )
    ready = [await _prompt(front, serving, body, prompt, checked.max_tokens) for prompt in prompts]
    checked = replace(checked, grammar=await grammar_of(front, serving, checked.form))
    return plan(front, Parting(serving), ready, checked, clock)


async def _prompt(
    front: Front, serving: Serving, body: CompletionBody, prompt: str | list[int], max_tokens: int | None
) -> Prompt:
    echo: str | None = None
    if isinstance(prompt, str):
        text = echo = prompt
        special = body.add_special_tokens is not False
        ids = await openai_ids(front, serving, prompt, add_special_tokens=special)
    else:
        text, ids = "", given_ids(serving, prompt)
    granted = check_length(len(ids), max_tokens, serving.info, "prompt")
    if body.echo and echo is None:
        echo = await front.workers.run(serving.tokenizer.decode, ids)
    return Prompt(text, ids, granted, echo=echo if body.echo else None)


def _chunks(body: CompletionBody, job: Job) -> Chunks:
    tokenizer = job.serving.tokenizer
    wanted = body.logprobs is not None
    return Chunks(
        job,
        chat=False,
        logprobs=(lambda tokens: completion_logprobs(tokenizer, tokens)) if wanted else None,
        stream_options=body.stream_options,
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
    tokenizer, prompt = job.serving.tokenizer, job.prompts[index // job.checked.keep]
    logprobs = None
    if body.logprobs is not None:
        # Scorers count on one entry for each; an end of sequence is one.
        tokens = answer.generated
        if prompt.echo is not None:
            echoed = prompt_tokens(tokenizer, prompt.ids, answer.done.prompt)
            tokens = [*echoed, *moved(tokens, len(prompt.echo))]
        logprobs = completion_logprobs(tokenizer, tokens)
    choice = {
        "index": index,
        "text": (prompt.echo or "") + answer.text,
        "logprobs": logprobs,
        "finish_reason": answer.done.ending.openai,
    }
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(tokenizer, answer.done.prompt, body.prompt_logprobs)
    return choice
