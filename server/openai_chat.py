"""`POST /v1/chat/completions`. Knows the shape of a chat and its answer; rules and running are elsewhere."""

import time
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .body import read_body
from .chat import render
from .front import Front, front_of
from .headers import Clock, full_headers
from .openai_chunks import ID, Chunks
from .openai_run import Finished, Job, Prompt, complete, plan, stream
from .openai_shapes import chat_logprobs, fingerprint, visible
from .prompts import openai_ids
from .schema_openai import ChatBody
from .stream import unless_gone
from .validate_openai import check_chat, check_length, check_model


async def chat_completions(request: HttpRequest) -> Response:
    """`POST /v1/chat/completions`."""
    body = await read_body(request, ChatBody)
    front, clock = front_of(request), Clock()
    sequences = sequences_of(body, front)
    if not body.stream:
        work = complete(front, sequences, lambda: prepare(front, body, clock))
        return _answer(front, body, await unless_gone(request, work), clock)
    return stream(
        front,
        sequences,
        lambda: prepare(front, body, clock),
        lambda job: _chunks(front, body, job),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def sequences_of(body: ChatBody, front: Front) -> int:
    """Permits to take before the checks, which then refuse a number out of range."""
    return max(1, min(body.n or 1, front.config.max_choices))


async def prepare(front: Front, body: ChatBody, clock: Clock) -> Job:
    """Check, render and tokenise; counts it. Raises NotReady, NoSuchModel, Invalid, Unsupported, TemplateFailed."""
    serving = front.backend.serving()
    check_model(body.model, front.model_name, serving.info)
    checked = check_chat(body, front.config, serving.info, serving.tokenizer.eos_ids)
    text = await render(front, serving, body)
    # The template has written the special tokens itself.
    ids = await openai_ids(front, serving, text, "messages", add_special_tokens=False)
    max_tokens = check_length(len(ids), checked.max_tokens, serving.info, "messages")
    return plan(front, serving, [Prompt(text, ids, max_tokens)], checked, clock)


def _chunks(front: Front, body: ChatBody, job: Job) -> Chunks:
    tokenizer = job.serving.tokenizer
    return Chunks(
        job.serving,
        front.model_name,
        chat=True,
        choices=len(job.runs),
        logprobs=(lambda tokens: chat_logprobs(tokenizer, tokens)) if body.logprobs else None,
    )


def _answer(front: Front, body: ChatBody, finished: Finished, clock: Clock) -> Response:
    job, ends = finished.job, finished.ends
    used = job.usage(ends)
    answer = {
        "id": ID,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": front.config.served_model_name or job.serving.info.model_id,
        "system_fingerprint": fingerprint(job.serving),
        "choices": [_choice(body, finished, i) for i in range(len(job.runs))],
        "usage": used,
    }
    timings = [done.timing for done in ends.values()]
    headers = full_headers(
        job.serving, job.text, clock, timings, job.prompt_tokens, used["completion_tokens"]
    )
    return Response(orjson.dumps(answer), 200, headers, "application/json")


def _choice(body: ChatBody, finished: Finished, index: int) -> dict[str, Any]:
    done = finished.ends[index]
    logprobs = None
    if body.logprobs:
        shown = visible(finished.tokens[index], len(done.text))
        logprobs = chat_logprobs(finished.job.serving.tokenizer, shown)
    return {
        "index": index,
        "message": {"role": "assistant", "content": done.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": done.ending.openai,
    }
