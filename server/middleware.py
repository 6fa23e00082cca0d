"""What happens to every HTTP request before a route sees it: tidy path, request id, bounded body; and to what no route has an
answer for. Pure ASGI."""

import logging
import os
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import BodyTooLarge, Busy, error_response, speaks_anthropic

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_SLASHES = re.compile(r"/{2,}")
_ID = "xlane.request_id"
"""Where a request's scope keeps its id."""
logger = logging.getLogger(__name__)


class TidyPaths:
    """`/v1//models` and `/v1/models/` are `/v1/models`: clients join a base URL and a path in many ways."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = _SLASHES.sub("/", scope["path"])
            path = path.rstrip("/") or "/"
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": path.encode(), "asked_path": scope["path"]}
        await self._app(scope, receive, send)


class RequestIds:
    """Answers carry `x-request-id`: the client's if it is harmless in a log, else a new one. Anthropic's clients look for
    it under `request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else os.urandom(12).hex()

        scope[_ID] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if speaks_anthropic(scope["path"]):
                    headers["request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class AnswerFailures:
    """An error that nobody foresaw is logged and answered here, with the headers that every answer gets further out. Once an
    answer has begun it goes on up, and the connection breaks off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if scope["type"] != "http" or begun:
                raise
            log_failure(scope, error)
            await error_response(error, scope["path"])(scope, receive, send)


def log_failure(scope: Scope, error: Exception) -> None:
    """Write down an error that its client is told nothing of but the request's id."""
    told = (scope["method"], scope["path"], scope.get(_ID))
    logger.error("%s %r failed, request %s", *told, exc_info=error)


class BodyLimit:
    """Bounds the bodies of requests: each, at once if its length is declared, else when that many bytes have come; and all
    that are held at a time, so that a crowd of large ones cannot take the memory that running requests need.

    A body is held from its first byte until its request is answered. One that is held alone has its own limit only, lest a
    large one be told for ever to come again.
    """

    def __init__(self, app: ASGIApp, limit: int, together: int) -> None:
        self._app = app
        self._limit, self._together = limit, together
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > self._limit:
            await error_response(self._too_large(), scope["path"])(scope, receive, send)
            return
        seen = 0

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            come = len(message.get("body", b""))
            seen += come
            self._held += come
            if seen > self._limit:
                raise self._too_large()
            if come and self._held > max(self._together, seen):
                raise Busy(
                    f"Bodies of requests hold {self._together} bytes already (--limit bodies_limit=…); ask again later"
                )
            return message

        try:
            await self._app(scope, receive_counted, send)
        finally:
            self._held -= seen

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request body is larger than {self._limit} bytes")
