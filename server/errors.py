"""What can go wrong in this room, and how every error, ours or the engine's, looks in each API. Decided here only.

ServerError
├── MalformedBody       the body is not JSON (400)
├── WrongShape          JSON, but not of the shape of this route
├── Invalid             a value breaks a limit or rule
│   ├── TooLong         the prompt and the tokens asked for do not fit the context
│   └── Unsupported     a known parameter this server has no effect for
├── TemplateFailed      the chat template is missing or refused these messages
├── NoSuchModel         another model or an adapter was asked for
├── Unauthorized        no key, or a wrong one
├── Forbidden           a key that may not do this
├── NoSuchRoute, WrongMethod, WrongContentType, BodyTooLarge
├── Busy                every permit is taken
│   └── RateLimited     this key has had what it may
├── NotReady            the engine is starting, restarting or going away
└── Incomplete          the engine ended a sequence without finishing it

TGI's shape is `{"error", "error_type"}`, OpenAI's is `{"error": {"message", "type", "param", "code"}}`, Anthropic's is
`{"type": "error", "error": {"type", "message"}}` with OpenAI's status.
"""

import math
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..engine import (
    DeadlineExceeded,
    EngineLost,
    EngineStopped,
    InvalidRequest,
    Overloaded,
    RequestFailed,
)

MAX_RETRY_AFTER_S = 120
"""openai-python ignores a longer advice and gives up."""
MAX_MESSAGE_CHARS = 2_000
"""A small body must not be able to cause a large error."""


class ServerError(Exception):
    """Base of every error this room raises on purpose."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class MalformedBody(ServerError):
    """The body is not JSON text."""


class WrongShape(ServerError):
    """The body is JSON of another shape than the route takes."""


class Invalid(ServerError):
    """A value breaks a limit or a rule."""


class TooLong(Invalid):
    """Prompt and output together do not fit the model's context."""


class Unsupported(Invalid):
    """A parameter of the API that this server cannot honour, so it is refused instead of ignored."""


class TemplateFailed(ServerError):
    """There is no chat template, or it refused these messages."""


class NoSuchModel(ServerError):
    """Another model than the served one was asked for."""


class Unauthorized(ServerError):
    """The key is missing or wrong."""


class Forbidden(ServerError):
    """The key is right, and may not do this."""


class NoSuchRoute(ServerError):
    """Nothing is served at this path."""


class WrongMethod(ServerError):
    """The path exists, the method does not."""


class WrongContentType(ServerError):
    """The body is not declared to be JSON."""


class BodyTooLarge(ServerError):
    """The body has more bytes than the payload limit."""


class Busy(ServerError):
    """All permits are taken; nothing is wrong with the request. `retry_after_s` estimates when some are free."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Busy):
    """A key has reached one of its limits."""


class NotReady(ServerError):
    """No engine answers yet, or no longer; the message says which. `retry_after_s` is when to ask again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Incomplete(ServerError):
    """The engine ended a sequence without a final answer."""


@dataclass(frozen=True, slots=True)
class _Row:
    """How one kind of error looks: TGI's status, type and prefix, then OpenAI's status, type and code."""

    tgi_status: int
    tgi_type: str
    tgi_prefix: str
    openai_status: int
    openai_type: str
    code: str | None = None
    retry: bool = False


_VALIDATION = "Input validation error: "
_GENERATION = "Request failed during generation: "
_CLIENT = "invalid_request_error"

_TABLE: dict[type[Exception], _Row] = {
    MalformedBody: _Row(400, "validation", "", 400, _CLIENT),
    WrongShape: _Row(422, "validation", "", 400, _CLIENT),
    TooLong: _Row(422, "validation", _VALIDATION, 400, _CLIENT, "context_length_exceeded"),
    Unsupported: _Row(422, "validation", _VALIDATION, 400, _CLIENT, "unsupported_parameter"),
    Invalid: _Row(422, "validation", _VALIDATION, 400, _CLIENT),
    TemplateFailed: _Row(422, "template_error", "Template error: ", 400, _CLIENT, "template_error"),
    NoSuchModel: _Row(404, "validation", "", 404, _CLIENT, "model_not_found"),
    Unauthorized: _Row(401, "unauthorized", "", 401, "authentication_error", "invalid_api_key"),
    Forbidden: _Row(403, "forbidden", "", 403, "permission_error", "forbidden"),
    NoSuchRoute: _Row(404, "not_found", "", 404, _CLIENT, "not_found"),
    WrongMethod: _Row(405, "method_not_allowed", "", 405, _CLIENT, "method_not_allowed"),
    WrongContentType: _Row(415, "validation", "", 415, _CLIENT, "unsupported_media_type"),
    BodyTooLarge: _Row(413, "validation", "", 413, _CLIENT, "payload_too_large"),
    Busy: _Row(429, "overloaded", "", 429, "rate_limit_error", "overloaded", retry=True),
    RateLimited: _Row(429, "overloaded", "", 429, "rate_limit_error", "rate_limit_exceeded", retry=True),
    NotReady: _Row(503, "not_ready", "", 503, "service_unavailable", "not_ready", retry=True),
    Incomplete: _Row(500, "incomplete_generation", "", 500, "server_error", "incomplete_generation"),
    InvalidRequest: _Row(422, "validation", _VALIDATION, 400, _CLIENT),
    Overloaded: _Row(429, "overloaded", "", 429, "rate_limit_error", "overloaded", retry=True),
    RequestFailed: _Row(424, "generation", _GENERATION, 500, "server_error", "generation_failed"),
    DeadlineExceeded: _Row(504, "deadline_exceeded", _GENERATION, 504, "server_error", "deadline_exceeded"),
    EngineLost: _Row(424, "generation", _GENERATION, 503, "server_error", "engine_lost", retry=True),
    EngineStopped: _Row(503, "not_ready", "", 503, "service_unavailable", "engine_stopped", retry=True),
}
_ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Status -> type there; other 4xx are `invalid_request_error`, other 5xx `api_error`."""
_UNEXPECTED = _Row(500, "internal", "", 500, "server_error", "internal_error")


@dataclass(frozen=True, slots=True)
class Problem:
    """One error, ready to be written in either shape."""

    message: str
    row: _Row
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def tgi(self, *, streaming: bool = False) -> dict[str, Any]:
        """TGI's object; a stream that breaks off has a type of its own there."""
        kind = self.row.tgi_type
        if streaming and kind == "incomplete_generation":
            kind = "incomplete_generation_stream"
        return {"error": f"{self.row.tgi_prefix}{self.message}", "error_type": kind}

    def openai(self) -> dict[str, Any]:
        """OpenAI's object."""
        row = self.row
        code = self.code or row.code
        return {
            "error": {"message": self.message, "type": row.openai_type, "param": self.param, "code": code}
        }

    def anthropic(self) -> dict[str, Any]:
        """Anthropic's object."""
        status = self.row.openai_status
        kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
        # Clients look for this wording, to shorten the conversation and try again.
        opening = "prompt is too long: " if self.row.code == "context_length_exceeded" else ""
        error: dict[str, Any] = {"type": kind, "message": f"{opening}{self.message}"}
        if self.code is not None:
            error["details"] = {"error_code": self.code}
        return {"type": "error", "error": error}


def problem_of(error: Exception) -> Problem:
    """What to tell the client about an error. Nothing of an unexpected one: its text may hold anything."""
    if isinstance(error, HTTPException):
        error = _from_starlette(error)
    row = next((_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE), None)
    if row is None:
        return Problem("Internal server error", _UNEXPECTED)
    retry_after = None
    if row.retry:
        seconds = error.retry_after_s if isinstance(error, Overloaded | Busy | NotReady) else 1.0
        retry_after = max(1, min(MAX_RETRY_AFTER_S, math.ceil(seconds)))
    return Problem(
        message=str(error)[:MAX_MESSAGE_CHARS],
        row=row,
        param=error.param if isinstance(error, ServerError) else None,
        code=error.code if isinstance(error, ServerError) else None,
        retry_after_s=retry_after,
    )


def _from_starlette(error: HTTPException) -> ServerError:
    if error.status_code == 405:
        return WrongMethod("This path does not take that method")
    if error.status_code == 404:
        return NoSuchRoute("There is nothing at this path")
    return MalformedBody(str(error.detail))


def speaks_openai(path: str) -> bool:
    """Whether errors at this path take OpenAI's shape; every other path speaks TGI."""
    return path.startswith(("/v1/", "/models/")) or path in ("/v1", "/models")


def speaks_anthropic(path: str) -> bool:
    """Whether errors at this path take Anthropic's shape."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_response(error: Exception, path: str) -> Response:
    """The answer to a failed request whose status line is not sent yet."""
    problem = problem_of(error)
    headers: dict[str, str] = {}
    if problem.retry_after_s is not None:
        headers["retry-after"] = str(problem.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge):
        # The rest of the body is not read, so the connection cannot be used again.
        headers["connection"] = "close"
    if isinstance(error, HTTPException) and error.headers:
        headers.update(error.headers)
    if speaks_anthropic(path):
        status, body = problem.row.openai_status, problem.anthropic()
    elif speaks_openai(path):
        status, body = problem.row.openai_status, problem.openai()
    else:
        status, body = problem.row.tgi_status, problem.tgi()
    if speaks_openai(path):
        # OpenAI's and Anthropic's clients ask again after any 409, 429 or 5xx, unless they are told better.
        headers["x-should-retry"] = "false" if problem.retry_after_s is None else "true"
    return Response(orjson.dumps(body), status, headers, "application/json")


def failure_label(error: BaseException) -> str:
    """The `err` label of `tgi_request_failure`; a cancelled or closed request was dropped by its client."""
    if not isinstance(error, Exception):
        return "dropped"
    row = problem_of(error).row
    names = {"template_error": "template", "incomplete_generation": "incomplete", "not_ready": "not_ready"}
    return names.get(row.tgi_type, row.tgi_type)
