"""The way of a request to the model that it asks for, which may have to be loaded first. Knows who waits how; not for what.

Whoever streams waits as long as it takes and is told how far it is, in comments of the stream. Whoever wants a whole answer
can be told nothing before it, so that wait has a bound.
"""

from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from .config import ServerConfig
from .front import Front, front_of
from .models import Models, ServedModel
from .stream import unless_gone

ENTERED = "xlane.entered"
"""Where a request's scope keeps the models it uses."""


class Entry:
    """One request's."""

    def __init__(self, request: HttpRequest, model: str | None = None) -> None:
        """`model`: the name that it asks for; that it is the one there is, is checked with the rest if there is one only. Raises
        NoSuchModel."""
        self._request = request
        self._models: Models | None = request.app.state.models
        self._asked = None if self._models is None else self._models.find(model)
        self._entered = False

    @property
    def config(self) -> ServerConfig:
        """The same for all models but for their names."""
        return front_of(self._request).config

    async def front(self) -> Front:
        """The model's front, when it is loaded. Raises NotReady, Busy, ClientGone."""
        if self._asked is None or self._asked.state == "loaded":
            return await self.patiently()
        return await unless_gone(self._request, self._enter(patient=False))

    async def patiently(self) -> Front:
        """The same for a stream, which tells its client of the wait and looks after its leaving. Raises NotReady, Busy."""
        return await self._enter(patient=True)

    def told(self) -> bytes | None:
        """While it waits, a comment for its client's stream."""
        if self._asked is None or self._entered or self._asked.state == "loaded":
            return None
        return f": loading {self._asked.name}: {self._asked.why}\n\n".encode()

    async def _enter(self, *, patient: bool) -> Front:
        if self._models is None or self._asked is None:
            return front_of(self._request)
        await self._models.enter(self._asked, patient=patient)
        self._request.scope[ENTERED].append(self._asked)
        self._entered = True
        return self._request.app.state.fronts[self._asked.name]


class ReleaseModels:
    """Middleware: a model that a request uses is not unloaded before the last byte of its answer."""

    def __init__(self, app: ASGIApp, models: Models) -> None:
        self._app, self._models = app, models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entered: list[ServedModel] = []
        scope[ENTERED] = entered
        try:
            await self._app(scope, receive, send)
        finally:
            for model in entered:
                self._models.release(model)
