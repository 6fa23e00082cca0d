"""`GET /docs` and `/api-doc/openapi.json`: the API described for people and for programs. Works without any network.

The document is made at the first request and kept. Knows no routes and no schemas.
"""

from functools import lru_cache
from importlib import metadata, resources

import orjson
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

# The page holds its own script and style and may fetch from this server; nothing else.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


async def page(request: HttpRequest) -> Response:
    """`GET /docs`."""
    return Response(_html(), media_type="text/html", headers={"content-security-policy": _POLICY})


async def document(request: HttpRequest) -> Response:
    """`GET /api-doc/openapi.json`."""
    app: Starlette = request.app
    if not hasattr(app.state, "api_document"):
        app.state.api_document = orjson.dumps(describe(app, keyed=app.state.front.config.keyed))
    return Response(app.state.api_document, media_type="application/json")


def describe(app: Starlette, *, keyed: bool) -> dict[str, object]:
    """The OpenAPI document of an app."""
    # It knows all handlers, these two among them.
    from .openapi import build

    return build(app.routes, version=metadata.version("xlane"), keyed=keyed)


@lru_cache(maxsize=1)
def _html() -> bytes:
    return (resources.files("xlane.server") / "docs.html").read_bytes()
