"""`POST /v1/responses`: OpenAI's newer API, without memory. Knows the body and the whole answer; rules, running and the
stream's events are elsewhere.
"""

from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .body import read_body
from .converse import converse
from .front import Front, front_of
from .headers import Clock
from .openai_chunks import failure
from .openai_run import Answer, Finished, Job, complete, stream
from .openai_shapes import answer_headers
from .reader import Call
from .responses_events import ResponseEvents
from .responses_input import conversation_of
from .responses_shapes import CALL_PREFIX, Envelope, Kind, call_item, item, item_id, new_id, part, status_of
from .schema_responses import ResponsesBody
from .stream import unless_gone
from .validate_openai import check_model, check_responses

_NOTHING: list[tuple[Kind, str] | Call] = [("message", "")]
"""An answer that says nothing has a message that says so."""


async def responses(request: HttpRequest) -> Response:
    """`POST /v1/responses`."""
    body = await read_body(request, ResponsesBody)
    front, clock = front_of(request), Clock()
    if body.stream:
        return stream(
            front, 1, lambda: _prepare(front, body, clock), lambda job: ResponseEvents(job, body), failure
        )
    finished = await unless_gone(request, complete(front, 1, lambda: _prepare(front, body, clock)))
    headers = answer_headers(finished, clock)
    return Response(orjson.dumps(_answer(body, finished)), 200, headers, "application/json")


async def _prepare(front: Front, body: ResponsesBody, clock: Clock) -> Job:
    serving = front.backend.serving()
    check_model(body.model, front.model_name, serving.info)
    checked = check_responses(body, serving.info, serving.tokenizer.eos_ids)
    return await converse(front, serving, conversation_of(body), checked, clock, wanted="max_output_tokens")


def _answer(body: ResponsesBody, finished: Finished) -> dict[str, Any]:
    (answer,) = finished.answers
    output = _output(answer, reasoning=body.include_reasoning is not False)
    return Envelope(finished.job, body).finished(answer.done, output, answer.reasoning_tokens)


def _output(answer: Answer, *, reasoning: bool) -> list[dict[str, Any]]:
    """The same items that a stream of this answer ends with."""
    said: list[tuple[Kind, str] | Call] = []
    if reasoning and answer.reasoning:
        said.append(("reasoning", answer.reasoning))
    for piece in answer.parts:
        said.append(("message", piece) if isinstance(piece, str) else piece)
    last = len(said or _NOTHING) - 1
    return [
        _item(piece, status_of(answer.done) if i == last else "completed")
        for i, piece in enumerate(said or _NOTHING)
    ]


def _item(said: tuple[Kind, str] | Call, status: str) -> dict[str, Any]:
    if isinstance(said, Call):
        return call_item(new_id(CALL_PREFIX), status, said.id, said.name, said.arguments)
    kind, text = said
    return item(kind, item_id(kind), status, [part(kind, text)])
