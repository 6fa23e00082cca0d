"""Counts compilations, so that "nothing compiles after ready" is a number and not a hope. Knows only jax's own events."""

import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_MISS = "/jax/compilation_cache/cache_misses"


class CompileCounter:
    """Counts backend compilations of one thread, from its creation until `close`."""

    def __init__(self, thread: threading.Thread) -> None:
        self.count = 0
        self._thread = thread
        self._listening = True
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _EVENT and threading.current_thread() is self._thread:
            self.count += 1

    def close(self) -> None:
        """Stop counting. May be called again."""
        if self._listening:
            self._listening = False
            jax.monitoring.unregister_event_duration_listener(self._heard)


class CacheMisses:
    """Counts programs that jax's persistent cache did not have, while it is entered."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "CacheMisses":
        jax.monitoring.register_event_listener(self._heard)
        return self

    def __exit__(self, *exc: object) -> None:
        jax.monitoring.unregister_event_listener(self._heard)

    def _heard(self, event: str, **kwargs: str | int) -> None:
        self.count += event == _MISS
