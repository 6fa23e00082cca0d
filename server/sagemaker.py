"""`POST /invocations`, SageMaker's one route: whichever of our bodies it carries is answered as on its own route."""

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from . import native
from .body import read_body
from .errors import WrongShape
from .openai_chat import chat_completions
from .openai_completions import completions

Handler = Callable[[HttpRequest], Awaitable[Response]]


class _Any(msgspec.Struct):
    """What tells the bodies apart."""

    inputs: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


async def invocations(request: HttpRequest) -> Response:
    """`POST /invocations`: native, then chat, then completion."""
    body = await read_body(request, _Any)
    routes: tuple[tuple[msgspec.Raw, str, Handler], ...] = (
        (body.inputs, "/", native.compat),
        (body.messages, "/v1/chat/completions", chat_completions),
        (body.prompt, "/v1/completions", completions),
    )
    for mark, path, handler in routes:
        if bytes(mark):
            # Errors take the shape of the path.
            request.scope["path"] = path
            return await handler(request)
    raise WrongShape("The body needs `inputs`, `messages` or `prompt`")
