"""TGI's generation routes: `POST /generate`, `/generate_stream` and `/`. Knows their JSON; the rules are validate_tgi's."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .backend import Serving
from .body import read_body
from .detokenize import Detokenizer
from .entry import Entry
from .errors import problem_of
from .front import Front, permits_for
from .generate import Done, Progress, Run, TextToken, collect, run_one
from .guide import grammar_of
from .headers import Clock, full_headers, stream_headers
from .prompt_scores import prompt_tokens
from .prompts import native_ids
from .schema_tgi import GenerateBody, GenerateParameters
from .stream import EventStream, event, unless_gone
from .validate import Checked, requests_of, with_adapter
from .validate_tgi import check_adapter, check_length, check_parameters, details_wanted

_NO_TOKEN = TextToken(id=0, text="", special=True, start=0, logprob=0.0, top=())


async def generate(request: HttpRequest) -> Response:
    """`POST /generate`."""
    body = await read_body(request, GenerateBody)
    front = await Entry(request).front()
    return await unless_gone(request, _answer(front, body, Clock()))


async def generate_stream(request: HttpRequest) -> Response:
    """`POST /generate_stream`."""
    body = await read_body(request, GenerateBody)
    return _stream(Entry(request), body)


async def compat(request: HttpRequest) -> Response:
    """`POST /`: as the hub's inference API, with `stream` in the body, the answer in a list, and the prompt in the
    text unless the request says otherwise."""
    body = await read_body(request, GenerateBody)
    entry = Entry(request)
    if body.stream:
        return _stream(entry, body, full_text=True)
    front = await entry.front()
    return await unless_gone(request, _answer(front, body, Clock(), full_text=True, listed=True))


@dataclass(frozen=True, slots=True)
class Job:
    """A native request that passed all checks."""

    serving: Serving
    inputs: str
    prompt_ids: list[int]
    checked: Checked
    runs: list[Run]
    details: bool
    prefix: str
    """What the generated text begins with: the prompt, if the full text is wanted."""


def sequences_of(body: GenerateBody, front: Front) -> int:
    """Permits to take before the checks; a permit comes first, as in TGI."""
    best_of = body.parameters.best_of if body.parameters else None
    return permits_for(best_of, front.config.max_best_of)


async def prepare(front: Front, body: GenerateBody, clock: Clock, *, streaming: bool, full_text: bool) -> Job:
    """Check and tokenise; counts it. Raises NotReady, Invalid, Unsupported."""
    serving = front.backend.serving()
    parameters = body.parameters or GenerateParameters()
    checked = check_parameters(parameters, front.config, serving.tokenizer.eos_ids, streaming=streaming)
    checked = with_adapter(checked, check_adapter(parameters.adapter_id, front.model_name, serving.info))
    ids = await native_ids(front, serving, body.inputs, parameters.truncate)
    max_tokens = check_length(len(ids), parameters.max_new_tokens, serving.info)
    checked = replace(checked, grammar=await grammar_of(front, serving, checked.form))
    runs = [
        Run(request, Detokenizer(serving.tokenizer, ids, checked.stops, include_stop=checked.include_stop))
        for request in requests_of(checked, ids, max_tokens)
    ]
    front.metrics.input_length.observe(len(ids))
    front.metrics.max_new_tokens.observe(max_tokens)
    front.metrics.validation_duration.observe(clock.submitted())
    wants_full = full_text if parameters.return_full_text is None else parameters.return_full_text
    prefix = body.inputs if wants_full else ""
    return Job(serving, body.inputs, ids, checked, runs, details_wanted(parameters), prefix)


def best_of(ends: Sequence[Done]) -> int:
    """Which sequence is returned."""
    return max(range(len(ends)), key=lambda choice: ends[choice].mean_logprob)


def answer_of(job: Job, tokens: Sequence[list[TextToken]], ends: Sequence[Done]) -> dict[str, Any]:
    """The JSON of the best sequence of a job, with the others in its details."""
    best = best_of(ends)
    answer: dict[str, Any] = {"generated_text": job.prefix + ends[best].text}
    if job.details:
        details = _details(job, tokens[best], ends[best], best)
        if len(ends) > 1:
            details["best_of_sequences"] = [
                {"generated_text": job.prefix + end.text, **_details(job, tokens[i], end, i)}
                for i, end in enumerate(ends)
                if i != best
            ]
        answer["details"] = details
    return answer


async def _answer(
    front: Front, body: GenerateBody, clock: Clock, *, full_text: bool = False, listed: bool = False
) -> Response:
    with front.metrics.request():
        with front.permits.take(sequences_of(body, front)):
            job = await prepare(front, body, clock, streaming=False, full_text=full_text)
            tokens, ends = await collect(job.serving.engine, job.runs, front.metrics)
        if job.checked.prompt_logprobs is None:
            answer = answer_of(job, tokens, ends)
        else:
            # The scores of a long prompt take so long to write that no stream should wait for it.
            answer = await front.workers.run(answer_of, job, tokens, ends)
        generated = ends[best_of(ends)].tokens
        timings = [done.timing for done in ends]
        headers = full_headers(job.serving, len(job.inputs), clock, timings, len(job.prompt_ids), generated)
        return Response(orjson.dumps([answer] if listed else answer), 200, headers, "application/json")


def _stream(entry: Entry, body: GenerateBody, *, full_text: bool = False) -> EventStream:
    headers: dict[str, str] = {}
    return EventStream(
        _events(entry, body, headers, full_text),
        extra_headers=headers,
        error_event=lambda error: event(problem_of(error).tgi(streaming=True)),
        keep_alive_s=entry.config.sse_keep_alive_s,
        waits=entry.told,
    )


async def _events(
    entry: Entry, body: GenerateBody, headers: dict[str, str], full_text: bool
) -> AsyncGenerator[bytes, None]:
    front = await entry.patiently()
    with front.metrics.request(), front.permits.take(1):
        job = await prepare(front, body, Clock(), streaming=True, full_text=full_text)
        headers.update(stream_headers(job.serving, len(job.inputs)))
        index = 0
        async with aclosing(run_one(job.serving.engine, job.runs[0], front.metrics)) as arrived:
            async for progress in arrived:
                yield b"".join(_token_events(job, progress, index))
                index += len(progress.tokens)


def _token_events(job: Job, progress: Progress, index: int) -> list[bytes]:
    """One event per token; the last of a sequence also has its text."""
    chunks: list[bytes] = []
    # Clients want a token in every event, so an end that came without one is told with an empty one.
    tokens = progress.tokens or (_NO_TOKEN,)
    last = len(tokens) - 1
    for i, token in enumerate(tokens):
        data: dict[str, Any] = {"index": index + i + 1, "token": _token(token)}
        if token.top:
            data["top_tokens"] = _top(job, token)
        done = progress.done if i == last else None
        data["generated_text"] = None if done is None else job.prefix + done.text
        data["details"] = None
        if done is not None and job.details:
            data["details"] = {
                "finish_reason": done.ending,
                "generated_tokens": done.tokens,
                "seed": job.runs[0].request.sampling.seed if job.checked.sampled else None,
                "input_length": len(job.prompt_ids),
            }
        chunks.append(event(data))
    return chunks


def _details(job: Job, tokens: list[TextToken], done: Done, choice: int) -> dict[str, Any]:
    details: dict[str, Any] = {
        "finish_reason": done.ending,
        "generated_tokens": done.tokens,
        "seed": job.runs[choice].request.sampling.seed if job.checked.sampled else None,
        "prefill": _prefill(job, done),
        "tokens": [_token(token) for token in tokens],
    }
    if any(token.top for token in tokens):
        details["top_tokens"] = [_top(job, token) for token in tokens]
    return details


def _prefill(job: Job, done: Done) -> list[dict[str, Any]]:
    """The prompt's tokens, if they are wanted. Nothing comes before the first, so it has no log-probability."""
    if job.checked.prompt_logprobs is None:
        return []
    return [
        {"id": token.id, "text": token.text, "logprob": token.logprob}
        for token in prompt_tokens(job.serving.tokenizer, job.prompt_ids, done.prompt)
    ]


def _token(token: TextToken) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob, "special": token.special}


def _top(job: Job, token: TextToken) -> list[dict[str, Any]]:
    """The likeliest tokens in this one's place."""
    tokenizer = job.serving.tokenizer
    return [
        {"id": i, "text": tokenizer.token_text(i), "logprob": logprob, "special": tokenizer.is_special(i)}
        for i, logprob in token.top
    ]
