"""Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`. Knows the body and the whole answer; rules, running and
the stream's events are elsewhere.
"""

from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .anthropic_events import MessageEvents, failure
from .anthropic_input import conversation_of, shows_thinking
from .anthropic_shapes import block, ending_of, message, usage_of, whole_call
from .body import read_body
from .converse import conversation_ids, converse
from .entry import Entry
from .front import Front
from .headers import Clock
from .openai_run import Finished, Job, complete, stream
from .openai_shapes import answer_headers
from .reader import Call
from .schema_anthropic import CountBody, MessagesBody
from .stream import unless_gone
from .validate import with_adapter
from .validate_anthropic import check_count, check_messages
from .validate_openai import check_model


async def messages(request: HttpRequest) -> Response:
    """`POST /v1/messages`."""
    body = await read_body(request, MessagesBody)
    entry = Entry(request, body.model)
    if body.stream:
        return stream(
            entry,
            1,
            lambda front: _prepare(front, body, Clock()),
            lambda job: MessageEvents(job, body),
            failure,
        )
    front, clock = await entry.front(), Clock()
    work = complete(
        front, 1, lambda: _prepare(front, body, clock), lambda finished: _answer(body, finished, clock)
    )
    return await unless_gone(request, work)


async def count_tokens(request: HttpRequest) -> Response:
    """`POST /v1/messages/count_tokens`."""
    body = await read_body(request, CountBody)
    front = await Entry(request, body.model).front()
    serving = front.backend.serving()
    check_model(body.model, front.model_name, serving.info)
    check_count(body)
    prompt = await conversation_ids(front, serving, conversation_of(body))
    return Response(orjson.dumps({"input_tokens": len(prompt.ids)}), media_type="application/json")


async def _prepare(front: Front, body: MessagesBody, clock: Clock) -> Job:
    serving = front.backend.serving()
    adapter = check_model(body.model, front.model_name, serving.info)
    checked = with_adapter(
        check_messages(body, front.config, serving.info, serving.tokenizer.eos_ids), adapter
    )
    # `max_tokens` must be sent, so clients send what suits another model; as here, that one ends where its context does.
    return await converse(front, serving, conversation_of(body), checked, clock, cut=True)


def _answer(body: MessagesBody, finished: Finished, clock: Clock) -> Response:
    (answer,), job = finished.answers, finished.job
    content: list[dict[str, Any]] = []
    if answer.reasoning and shows_thinking(body):
        content.append(block("thinking", answer.reasoning))
    content += [
        whole_call(piece) if isinstance(piece, Call) else block("text", piece) for piece in answer.parts
    ]
    if not content:
        content.append(block("text", ""))
    done = answer.done
    usage = usage_of(job, done.cached_tokens, done.tokens, answer.reasoning_tokens)
    whole = {**message(job, content, usage), **ending_of(job, body, done, len(answer.calls))}
    return Response(orjson.dumps(whole), 200, answer_headers(finished, clock), "application/json")
