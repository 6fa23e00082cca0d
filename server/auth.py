"""The door: with keys configured, every POST needs one, and keeps to its limits. GET routes (health, metrics, lists) are open,
but for those that tell of single requests. What changes the server itself takes a key that may do that.

By method, not by a list of paths, so that a new route cannot be forgotten. Decides on nothing but method and header.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import Forbidden, RateLimited, Unauthorized, error_response, speaks_anthropic
from .keys import ACCOUNT, Account, Keys

OPEN_METHODS = ("GET", "HEAD", "OPTIONS")
GUARDED = ("/ui/lanes",)
"""What asks for the key all the same."""
FOR_ADMINS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""What not every key may do: it changes what all are served."""


class RequireKey:
    """Middleware that lets a request through if it carries a key, and counts what is done under it."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _open(scope) or not self._keys:
            await self._app(scope, receive, send)
            return
        account = self._account(scope)
        if account is None:
            error = Unauthorized("A valid key is required: send `Authorization: Bearer <key>`")
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if scope["path"] in FOR_ADMINS and not account.key.admin:
            error = Forbidden(
                f"The key {account.key.name!r} may not change what is served: --api-key may, and in --api-key-file each that is "
                "marked `admin`"
            )
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if scope["method"] in OPEN_METHODS:  # to look costs nobody's allowance
            await self._app(scope, receive, send)
            return
        token = ACCOUNT.set(account)  # The tasks that this request starts inherit it.
        try:
            with account.request():
                await self._app(scope, receive, send)
        except RateLimited as error:
            await error_response(error, scope["path"])(scope, receive, send)
        finally:
            ACCOUNT.reset(token)

    def _account(self, scope: Scope) -> Account | None:
        """Whose key it is. Anthropic's clients send it under a name of their own."""
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        bearer = self._keys.find(key.strip())
        if bearer is not None and scheme.lower() == b"bearer":
            return bearer
        return (
            self._keys.find(_header(scope, b"x-api-key").strip()) if speaks_anthropic(scope["path"]) else None
        )


def _open(scope: Scope) -> bool:
    return scope["method"] in OPEN_METHODS and (scope["path"] not in GUARDED or scope["method"] == "OPTIONS")


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")
