"""What the routes share: configuration, backend, permits, text threads, metrics. One per app, no globals."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from time import monotonic

from starlette.requests import Request as HttpRequest

from .backend import Backend, Serving
from .config import ServerConfig
from .errors import Busy, Invalid
from .grammars import Grammars
from .keys import Keys, own_share
from .metrics import Metrics
from .models import Models
from .reasoning import Markers
from .text import TextWorkers
from .validate_openai import check_model

WINDOW = 64
"""Requests that the estimate of a permit's return looks back on."""


CROWD = 8
"""How many times the permits that are left one key may hold, where there are several: a flood of its own leaves a ninth of
them to the others."""


class Permits:
    """How many sequences may be in flight. Never waits: a full house is an answer, not a queue."""

    def __init__(self, total: int, keys: Keys | None = None) -> None:
        self._total, self._keys = total, keys
        self._taken = 0
        self._by_key: Counter[str] = Counter()
        self._held_s: deque[float] = deque(maxlen=WINDOW)

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Hold `count` permits for a block. Raises Busy, and Invalid for more than there are: it would be busy for ever."""
        if count > self._total:
            raise Invalid(
                f"{count} sequences in one request, and at most {self._total} can be in flight "
                "(--max-concurrent-requests): ask for fewer"
            )
        if self._taken + count > self._total:
            raise Busy("Model is overloaded", self.turnover_s)
        owner, _ = own_share()
        if self._crowds(owner, count):
            raise Busy(f"The key {owner!r} holds its share of this server", self.turnover_s)
        self._taken += count
        self._by_key[owner] += count
        started = monotonic()
        try:
            yield
            self._held_s.append(
                monotonic() - started
            )  # what failed, or was refused, says nothing of the load
        finally:
            self._taken -= count
            self._by_key[owner] -= count

    def _crowds(self, owner: str, count: int) -> bool:
        """Whether so many more would leave too little to the others. A key that holds none yet never does."""
        held = self._by_key[owner]
        if not held or self._keys is None or len(self._keys.accounts) < 2:
            return False
        return held + count > CROWD * (self._total - self._taken - count)

    @property
    def turnover_s(self) -> float:
        """Mean time that the last requests held theirs, in which about as many as are held now come back."""
        return fmean(self._held_s) if self._held_s else 1.0

    @property
    def taken(self) -> int:
        """Permits held now."""
        return self._taken


def permits_for(asked: int | None, most: int) -> int:
    """Permits to take before the checks: for as many sequences as are asked for, but for a number that they will refuse."""
    return asked if asked is not None and 1 <= asked <= most else 1


@dataclass(frozen=True, slots=True)
class Front:
    """Everything a route may use."""

    config: ServerConfig
    backend: Backend
    permits: Permits
    metrics: Metrics
    workers: TextWorkers
    grammars: Grammars
    keys: Keys

    @property
    def model_name(self) -> str:
        """The name of the served model in replies. Raises NotReady."""
        return self.config.served_model_name or self.backend.serving().info.model_id

    @property
    def parts_thinking(self) -> bool:
        """Whether thinking is to be told apart from the answer."""
        return self.config.reasoning_parser == "auto"

    def markers(self, serving: Serving) -> Markers | None:
        """Where to part thinking from answer, if that is to be done."""
        return serving.markers if self.parts_thinking else None

    def close(self) -> None:
        """Let go of its threads and processes."""
        self.workers.close()
        self.grammars.close()


def make_front(backend: Backend, config: ServerConfig) -> Front:
    """All that answering takes beside the engine. Raises UsageError."""
    keys = Keys(config.api_key, config.api_key_file)
    return Front(
        config=config,
        backend=backend,
        permits=Permits(config.max_concurrent_requests, keys),
        metrics=Metrics(),
        workers=TextWorkers(config.validation_workers),
        keys=keys,
        grammars=Grammars(config.max_grammar_bytes, config.grammar_timeout_s),
    )


def front_beside(front: Front, name: str, backend: Backend) -> Front:
    """The same for another model on the same port, with permits and metrics of its own."""
    return replace(
        front,
        config=replace(front.config, served_model_name=name),
        backend=backend,
        permits=Permits(front.config.max_concurrent_requests, front.keys),
        metrics=Metrics(),
    )


def front_of(request: HttpRequest) -> Front:
    """The front this request came in through: of the first model, if there are several."""
    return request.app.state.front


def front_named(request: HttpRequest, name: str | None) -> Front:
    """The front of a model as it is now: of several, loaded or not. Raises NoSuchModel; for the only one NotReady, too."""
    models: Models | None = request.app.state.models
    if models is not None:
        return request.app.state.fronts[models.find(name).name]
    front = front_of(request)
    check_model(name, front.model_name, front.backend.serving().info)
    return front
