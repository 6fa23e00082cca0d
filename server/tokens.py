"""The routes that turn texts into tokens and back: TGI's, and under `prompt` and `tokens` vLLM's. Knows their JSON."""

from collections.abc import Sequence

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..models.errors import TokenizerError
from .backend import Serving
from .body import read_body
from .chat import conversation_of, render
from .entry import Entry
from .errors import Invalid, Unsupported, WrongShape
from .front import Front
from .schema_openai import ChatBody, Message
from .schema_tgi import DetokenizeBody, TokenizeBody
from .unsupported import CHAT, refuse


async def tokenize(request: HttpRequest) -> Response:
    """`POST /tokenize`: the tokens of `inputs`, with byte offsets, or of `prompt` or `messages`, as a list of ids."""
    body = await read_body(request, TokenizeBody)
    front = await Entry(request, body.model).front()
    serving = front.backend.serving()
    special = body.add_special_tokens is not False
    if body.inputs is not None:
        return _json(await _told(front, serving, body.inputs, add_special_tokens=special))
    if body.messages is not None:
        _, spans = await _chat_spans(front, serving, _chat_of(body, body.messages))
    elif body.prompt is not None:
        spans = await _spans(front, serving, body.prompt, add_special_tokens=special)
    else:
        raise WrongShape("The body needs `inputs`, `prompt` or `messages`", param="inputs")
    ids = [i for i, _, _ in spans]
    strings = [serving.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    limit = serving.info.max_total_tokens
    return _json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})


async def detokenize(request: HttpRequest) -> Response:
    """`POST /detokenize`: the text of `tokens` (or `ids`), special ones shown unless they are to be left out."""
    body = await read_body(request, DetokenizeBody)
    front = await Entry(request).front()
    serving = front.backend.serving()
    name, ids = ("ids", body.ids) if body.tokens is None else ("tokens", body.tokens)
    if ids is None:
        raise WrongShape("The body needs `tokens` or `ids`", param="tokens")
    if ids and not 0 <= min(ids) <= max(ids) < serving.info.vocab_size:
        raise Invalid(f"`{name}` has an id outside 0 … {serving.info.vocab_size - 1}", param=name)
    text = await front.workers.run(serving.tokenizer.decode, ids, bool(body.skip_special_tokens))
    return _json({"text": text, "prompt": text})


async def chat_tokenize(request: HttpRequest) -> Response:
    """`POST /chat_tokenize`: a conversation as the model sees it, as text and as tokens."""
    body = await read_body(request, ChatBody)
    front = await Entry(request, body.model).front()
    serving = front.backend.serving()
    text, spans = await _chat_spans(front, serving, body)
    return _json({"tokenize_response": _shown(text, spans), "templated_text": text})


def _chat_of(body: TokenizeBody, messages: list[Message]) -> ChatBody:
    """The chat whose tokens are asked for. Raises Unsupported."""
    if body.add_special_tokens:
        raise Unsupported(
            "`add_special_tokens` is not supported with `messages`: their template writes all there are",
            param="add_special_tokens",
        )
    chat = ChatBody(
        messages=messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    refuse(chat, CHAT)
    return chat


async def _chat_spans(
    front: Front, serving: Serving, body: ChatBody
) -> tuple[str, Sequence[tuple[int, int, int]]]:
    """A conversation's text and its tokens. Raises Invalid, TemplateFailed."""
    made = (await render(front, serving, conversation_of(body))).text
    try:
        return await front.workers.run(serving.tokenizer.encode_chat_offsets, made)
    except TokenizerError as error:
        raise Invalid(f"tokenizer error {error}") from error


async def _spans(
    front: Front, serving: Serving, text: str, *, add_special_tokens: bool
) -> Sequence[tuple[int, int, int]]:
    try:
        return await front.workers.run(serving.tokenizer.encode_offsets, text, add_special_tokens)
    except TokenizerError as error:
        raise Invalid(f"tokenizer error {error}") from error


async def _told(
    front: Front, serving: Serving, text: str, *, add_special_tokens: bool
) -> list[dict[str, object]]:
    return _shown(text, await _spans(front, serving, text, add_special_tokens=add_special_tokens))


def _shown(text: str, spans: Sequence[tuple[int, int, int]]) -> list[dict[str, object]]:
    """Tokens beside their pieces of the text."""
    raw = text.encode()
    return [
        {"id": i, "text": raw[start:stop].decode(errors="replace"), "start": start, "stop": stop}
        for i, start, stop in spans
    ]


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
