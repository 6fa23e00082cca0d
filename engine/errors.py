"""Everything that can go wrong in this room, drawn once.

EngineError
├── InvalidRequest      the request can never be served here (a limit, an id out of range): the client's fault
├── Overloaded          the queue is full: try again later
├── RequestFailed       this request failed while running; others go on
├── DeadlineExceeded    the request's own deadline passed
├── EngineLost          the engine process or its connection went away while the request ran; it may be replayed
├── EngineStopped       the engine is draining or has stopped and takes no more work
└── PlanError           the configuration cannot work on this device (memory, sizes); raised at start only

Each message says what was wrong, with the value, and what to do. Knows no HTTP status: the server maps types to codes.
"""


class EngineError(Exception):
    """Base of every error this room raises on purpose."""


class InvalidRequest(EngineError):
    """The request breaks a limit of this engine and would break it again."""


class Overloaded(EngineError):
    """The queue is full; `retry_after_s` estimates when a place is free."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestFailed(EngineError):
    """The engine failed while this request ran."""


class DeadlineExceeded(EngineError):
    """The request's deadline passed before it was finished."""


class EngineLost(EngineError):
    """The connection to the engine broke; what was not yet received must be asked for again.

    `blameless`: no request can be why, since it was not reached at all, or ended in order.
    """

    def __init__(self, message: str, *, blameless: bool = False) -> None:
        super().__init__(message)
        self.blameless = blameless


class EngineStopped(EngineError):
    """The engine takes no more requests."""


class PlanError(EngineError):
    """The model and configuration do not fit the device."""
