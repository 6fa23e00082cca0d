"""Routes and what is told of them → an OpenAPI 3.1 document. Knows the form of the document, not what any route does.

Bodies and answers are described by their msgspec types, so what is described is what is decoded.
"""

import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import msgspec
from starlette.routing import BaseRoute, Route

from .answers_anthropic import AnthropicProblem
from .answers_openai import OpenAIProblem
from .answers_tgi import Problem
from .auth import FOR_ADMINS, GUARDED
from .errors import speaks_anthropic, speaks_openai
from .operations import OPERATIONS, Operation

REF = "#/components/schemas/{name}"
JSON, EVENTS = "application/json", "text/event-stream"
_READ = {503: "The server is not ready"}
_BODY = {
    400: "The body is not JSON, or is wrong (OpenAI's routes)", 401: "A key is asked for", 413: "The body is too large",
    415: "The body is not declared to be JSON", 422: "The body is wrong",
}  # fmt: skip
_GENERATION = {
    424: "The engine failed the request", 429: "Overloaded; try again", 500: "The generation is incomplete",
    504: "A deadline has passed",
}  # fmt: skip
_NO_MODEL = {404: "No such model"}
_ADMIN = {403: "The key may not do this"}
_REASONS = {200: "Done", **_NO_MODEL, **_ADMIN, **_READ, **_BODY, **_GENERATION}
_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")


def build(routes: Sequence[BaseRoute], *, version: str, keyed: bool) -> dict[str, object]:
    """The document of these routes. `keyed`: whether POST asks for a key here."""
    told = [(route, _operation(route)) for route in routes if isinstance(route, Route)]
    kinds = _Kinds(kind for _, operation in told for kind in _kinds_of(operation))
    paths: dict[str, dict[str, object]] = {}
    for route, operation in told:
        method = "post" if "POST" in (route.methods or ()) else "get"
        path = _PARAMETER.sub(r"{\1}", route.path)
        # Of two routes with one path the first is served.
        paths.setdefault(path, {}).setdefault(method, _describe(path, method, route, operation, kinds, keyed))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "xlane",
            "version": version,
            "description": "LLM serving compiled by XLA. Unknown fields are ignored and null means absent, everywhere.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(operation.group for _, operation in told)],
        "paths": paths,
        "components": {
            "schemas": kinds.components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> Operation:
    """What is told of a route, or what can be said of any."""
    summary = (route.endpoint.__doc__ or route.name).partition("\n")[0]
    posts = "POST" in (route.methods or ())
    return OPERATIONS.get(route.endpoint) or Operation(
        group="Other",
        summary=summary,
        body=dict[str, Any] if posts else None,
        answer=dict[str, Any],
        generates=posts,
    )


def _kinds_of(operation: Operation) -> Iterable[Any]:
    for kind in (operation.body, operation.answer, operation.event, *operation.also.values()):
        if kind is not None:
            yield from _members(kind)
    yield from (Problem, OpenAIProblem, AnthropicProblem)


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union of structs, which msgspec cannot decode but this document can show."""
    return get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


class _Kinds:
    """Schemas by type, and the components they refer to."""

    def __init__(self, kinds: Iterable[Any]) -> None:
        unique = list(dict.fromkeys(kinds))
        schemas, self.components = msgspec.json.schema_components(unique, ref_template=REF)
        self._schemas: dict[Any, Mapping[str, Any]] = dict(zip(unique, schemas, strict=True))

    def schema(self, kind: Any) -> Mapping[str, Any]:
        """The schema of a type or of a union of types."""
        found = [self._schemas[member] for member in _members(kind)]
        return found[0] if len(found) == 1 else {"anyOf": found}


def _describe(
    path: str, method: str, route: Route, operation: Operation, kinds: _Kinds, keyed: bool
) -> dict[str, object]:
    described: dict[str, object] = {
        "tags": [operation.group],
        "summary": operation.summary,
        "operationId": "_".join([_name(route.endpoint), *re.findall(r"\w+", path)]),
        "responses": _responses(path, operation, kinds),
    }
    told = {"schema": {"type": "string", "minLength": 1}}
    parameters = [{"name": name, "in": "path", "required": True, **told} for name in _PARAMETER.findall(path)]
    for name, meaning in operation.query.items():
        parameters.append({"name": name, "in": "query", "required": False, "description": meaning, **told})
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        content: dict[str, object] = {"schema": kinds.schema(operation.body)}
        if operation.example is not None:
            content["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    if method == "post" or path in GUARDED:
        described["security"] = [{"key": []}] if keyed else [{}, {"key": []}]
    return described


def _name(endpoint: Callable[..., Any]) -> str:
    return endpoint.__name__


def _responses(path: str, operation: Operation, kinds: _Kinds) -> dict[str, object]:
    openai = speaks_openai(path)
    shapes: Any = OpenAIProblem if openai else Problem
    if operation.both_errors:
        shapes = OpenAIProblem | Problem
    elif speaks_anthropic(path):
        shapes = AnthropicProblem
    problem = {JSON: {"schema": kinds.schema(shapes)}}
    statuses: dict[int, str] = (
        {} if operation.always or operation.media or not operation.answer else dict(_READ)
    )
    if operation.body is not None:
        statuses |= _BODY
    if path in GUARDED:
        statuses[401] = _BODY[401]
    if path in FOR_ADMINS:
        statuses |= _ADMIN
    if operation.generates:
        statuses |= _READ | _GENERATION | _NO_MODEL
    if not operation.both_errors:
        for status in (422, 424) if openai else ():
            statuses.pop(status, None)
    responses: dict[str, object] = {"200": _success(operation, kinds)}
    for status, reason in sorted(statuses.items()):
        responses[str(status)] = {"description": reason, "content": problem}
    for status, kind in operation.also.items():
        responses[str(status)] = {
            "description": _REASONS[status],
            "content": {JSON: {"schema": kinds.schema(kind)}},
        }
    return responses


def _success(operation: Operation, kinds: _Kinds) -> dict[str, object]:
    content: dict[str, object] = {}
    if operation.answer is not None and not operation.always_streams:
        content[JSON] = {"schema": kinds.schema(operation.answer)}
    if operation.event is not None:
        # OpenAPI has no word for a stream's events; this one is read by our page and our tests.
        content[EVENTS] = {"x-event-schema": kinds.schema(operation.event)}
    if operation.media:
        content[operation.media] = {"schema": {"type": "string"}}
    described: dict[str, object] = {"description": _REASONS[200]}
    return described | ({"content": content} if content else {})
