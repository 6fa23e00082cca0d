"""Where a running sequence tells of itself, for whoever watches the HTTP request it belongs to. Knows no tracing library.

Set by a middleware, read where sequences run: tasks started for a request inherit it.
"""

from contextvars import ContextVar
from typing import Protocol

from ..engine import Request, Timing


class Watch(Protocol):
    """Hears of the sequences of one HTTP request. Never raises."""

    def started(self, request: Request) -> None:
        """The engine is asked."""
        ...

    def ended(
        self, request: Request, reason: str, tokens: int, cached_tokens: int, timing: Timing | None
    ) -> None:
        """It came to its end, for this reason (OpenAI's word)."""
        ...

    def failed(self, request: Request, error: Exception) -> None:
        """It came to none."""
        ...


WATCH: ContextVar[Watch | None] = ContextVar("xlane_watch", default=None)
"""Of the HTTP request now handled; None if nobody watches."""
