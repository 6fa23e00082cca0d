"""`POST /v1/chat/completions`. Knows the shape of a chat and its answer; rules and running are elsewhere."""

import time
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .body import read_body
from .chat import conversation_of
from .config import ServerConfig
from .converse import converse
from .entry import Entry
from .front import Front, permits_for
from .headers import Clock
from .openai_chunks import ID, Chunks, failure
from .openai_run import Answer, Finished, Job, complete, stream
from .openai_shapes import answer_headers, chat_logprobs, fingerprint, prompt_logprobs, usage_of
from .reader import openai_finish
from .schema_openai import ChatBody
from .stream import unless_gone
from .validate import with_adapter
from .validate_openai import check_chat, check_model

STAINLESS = "x-stainless-lang"
"""The header by which OpenAI's own clients are known: they join the roles of all chunks, as if those were pieces of text."""


async def chat_completions(request: HttpRequest) -> Response:
    """`POST /v1/chat/completions`."""
    body = await read_body(request, ChatBody)
    entry = Entry(request, body.model)
    sequences = sequences_of(body, entry.config)
    if not body.stream:
        front, clock = await entry.front(), Clock()
        work = complete(
            front,
            sequences,
            lambda: prepare(front, body, clock),
            lambda finished: _answer(body, finished, clock),
        )
        return await unless_gone(request, work)
    return stream(
        entry,
        sequences,
        lambda front: prepare(front, body, Clock()),
        lambda job: _chunks(body, job, role_once=STAINLESS in request.headers),
        failure,
    )


def sequences_of(body: ChatBody, config: ServerConfig) -> int:
    """Permits to take before the checks."""
    return permits_for(body.n, config.max_choices)


async def prepare(front: Front, body: ChatBody, clock: Clock) -> Job:
    """Check, render and tokenise; counts it. Raises NotReady, NoSuchModel, Invalid, Unsupported, TemplateFailed."""
    serving = front.backend.serving()
    adapter = check_model(body.model, front.model_name, serving.info)
    checked = with_adapter(check_chat(body, front.config, serving.info, serving.tokenizer.eos_ids), adapter)
    return await converse(front, serving, conversation_of(body), checked, clock)


def _chunks(body: ChatBody, job: Job, *, role_once: bool) -> Chunks:
    tokenizer = job.serving.tokenizer
    return Chunks(
        job,
        chat=True,
        logprobs=(lambda tokens: chat_logprobs(tokenizer, tokens)) if body.logprobs else None,
        stream_options=body.stream_options,
        reasoning=body.include_reasoning is not False,
        role_once=role_once,
    )


def _answer(body: ChatBody, finished: Finished, clock: Clock) -> Response:
    job = finished.job
    answer = {
        "id": ID,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": job.model,
        "system_fingerprint": fingerprint(job.serving),
        "choices": [_choice(body, job, answer, i) for i, answer in enumerate(finished.answers)],
        "usage": usage_of(finished),
    }
    if body.prompt_logprobs is not None:
        scored = finished.answers[0].done.prompt
        answer["prompt_logprobs"] = prompt_logprobs(job.serving.tokenizer, scored, body.prompt_logprobs)
    return Response(orjson.dumps(answer), 200, answer_headers(finished, clock), "application/json")


def _choice(body: ChatBody, job: Job, answer: Answer, index: int) -> dict[str, Any]:
    calls = answer.calls
    content = answer.text or None if calls else answer.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls and job.legacy:
        message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    if job.parting.thinks and body.include_reasoning is not False:
        # Clients look for it under one name or the other.
        message["reasoning"] = message["reasoning_content"] = answer.reasoning or None
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(job.serving.tokenizer, answer.tokens) if body.logprobs else None,
        "finish_reason": openai_finish(answer.done, len(calls), legacy=job.legacy),
    }
