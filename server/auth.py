"""Who may ask for work: with a key configured, every POST needs it. GET routes (health, metrics, lists) are open, but
for those that tell of single requests.

By method, not by a list of paths, so that a new route cannot be forgotten. Decides on nothing but method and header.
"""

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import Unauthorized, error_response, speaks_anthropic

OPEN_METHODS = ("GET", "HEAD", "OPTIONS")
GUARDED = ("/ui/lanes",)
"""What asks for the key all the same."""


class RequireKey:
    """Middleware that lets a request through if it carries the key."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        # Digests have one length, so comparing them tells nothing of the key's.
        self._digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _open(scope) or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = Unauthorized("A valid key is required: send `Authorization: Bearer <key>`")
        await error_response(error, scope["path"])(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if self._digest is None:
            return True
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        if hmac.compare_digest(_digest(key.strip()), self._digest) and scheme.lower() == b"bearer":
            return True
        # Anthropic's clients send it under a name of their own.
        other = _header(scope, b"x-api-key") if speaks_anthropic(scope["path"]) else b""
        return hmac.compare_digest(_digest(other.strip()), self._digest)


def _open(scope: Scope) -> bool:
    return scope["method"] in OPEN_METHODS and (scope["path"] not in GUARDED or scope["method"] == "OPTIONS")


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
