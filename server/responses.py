"""`POST /v1/responses`: OpenAI's newer API, without memory. Knows the body and the whole answer; rules, running and the
stream's events are elsewhere.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .body import read_body
from .converse import converse
from .entry import Entry
from .front import Front
from .generate import TextToken
from .headers import Clock
from .openai_chunks import failure
from .openai_run import Answer, Finished, Job, complete, stream
from .openai_shapes import answer_headers
from .reader import Call
from .reasoning import visible
from .responses_events import ResponseEvents
from .responses_input import conversation_of
from .responses_shapes import (
    CALL_PREFIX,
    Envelope,
    Kind,
    call_item,
    item,
    item_id,
    logprobs_of,
    new_id,
    part,
    status_of,
)
from .schema_responses import ResponsesBody
from .stream import unless_gone
from .validate import with_adapter
from .validate_openai import check_model, check_responses, scores_of

_NOTHING: list[tuple[Kind, str] | Call] = [("message", "")]
"""An answer that says nothing has a message that says so."""


async def responses(request: HttpRequest) -> Response:
    """`POST /v1/responses`."""
    body = await read_body(request, ResponsesBody)
    entry = Entry(request, body.model)
    if body.stream:
        return stream(
            entry,
            1,
            lambda front: _prepare(front, body, Clock()),
            lambda job: ResponseEvents(job, body),
            failure,
        )
    front, clock = await entry.front(), Clock()
    work = complete(
        front, 1, lambda: _prepare(front, body, clock), lambda finished: _answer(body, finished, clock)
    )
    return await unless_gone(request, work)


async def _prepare(front: Front, body: ResponsesBody, clock: Clock) -> Job:
    serving = front.backend.serving()
    adapter = check_model(body.model, front.model_name, serving.info)
    checked = with_adapter(check_responses(body, serving.info, serving.tokenizer.eos_ids), adapter)
    return await converse(front, serving, conversation_of(body), checked, clock, wanted="max_output_tokens")


def _answer(body: ResponsesBody, finished: Finished, clock: Clock) -> Response:
    (answer,) = finished.answers
    output = _output(finished.job, answer, body)
    response = Envelope(finished.job, body).finished(answer.done, output, answer.reasoning_tokens)
    return Response(orjson.dumps(response), 200, answer_headers(finished, clock), "application/json")


def _output(job: Job, answer: Answer, body: ResponsesBody) -> list[dict[str, Any]]:
    """The same items that a stream of this answer ends with."""
    reasoning = body.include_reasoning is not False
    tokens = tokens_of_texts(answer) if scores_of(body) else repeat(())
    said: list[tuple[Kind, str] | Call] = []
    if reasoning and answer.reasoning:
        said.append(("reasoning", answer.reasoning))
    for piece in answer.parts:
        said.append(("message", piece) if isinstance(piece, str) else piece)
    last = len(said or _NOTHING) - 1
    items: list[dict[str, Any]] = []
    for i, piece in enumerate(said or _NOTHING):
        status = status_of(answer.done) if i == last else "completed"
        if isinstance(piece, Call):
            items.append(call_item(new_id(CALL_PREFIX), status, piece.id, piece.name, piece.arguments))
            continue
        kind, text = piece
        scores = logprobs_of(job, next(tokens, ())) if kind == "message" else []
        items.append(item(kind, item_id(kind), status, [part(kind, text, scores)]))
    return items


def tokens_of_texts(answer: Answer) -> Iterator[list[TextToken]]:
    """The tokens of each text of an answer, those of calls left out."""
    whole, at = answer.done.text, answer.tokens[0].start if answer.tokens else 0
    for text in answer.parts:
        told = text if isinstance(text, str) else text.arguments
        start = max(at, whole.find(told, at))
        at = start + len(told)
        if isinstance(text, str):
            yield visible(answer.tokens, (start, at))
