"""Turns a stream of requests into steps on the device. Knows tokens, lanes and pages; not text, not HTTP.

Importing this package imports no jax: `Engine` and what else needs the device is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from .client import EngineClient
from .config import EngineConfig
from .errors import (
    DeadlineExceeded,
    EngineError,
    EngineLost,
    EngineStopped,
    InvalidRequest,
    Overloaded,
    PlanError,
    RequestFailed,
)
from .grammar_bounds import MAX_GRAMMAR_BYTES, check_grammar, compilers, grammar_limits
from .request import (
    DURATION_EDGES_S,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    ROWS_EDGES,
    EngineInfo,
    EngineStats,
    FinishReason,
    Histogram,
    LaneStats,
    LaunchStats,
    LogprobsMode,
    ProgramInfo,
    Request,
    SamplingParams,
    StepOutput,
    Timing,
    TokenOutput,
    check_prompt_scores,
)

if TYPE_CHECKING:
    from .engine import Engine

__all__ = [
    "DURATION_EDGES_S",
    "MAX_GRAMMAR_BYTES",
    "MAX_LOGIT_BIAS",
    "MAX_TOP_LOGPROBS",
    "ROWS_EDGES",
    "DeadlineExceeded",
    "Engine",
    "EngineClient",
    "EngineConfig",
    "EngineError",
    "EngineInfo",
    "EngineLost",
    "EngineStats",
    "EngineStopped",
    "FinishReason",
    "Histogram",
    "InvalidRequest",
    "LaneStats",
    "LaunchStats",
    "LogprobsMode",
    "Overloaded",
    "PlanError",
    "ProgramInfo",
    "Request",
    "RequestFailed",
    "SamplingParams",
    "StepOutput",
    "Timing",
    "TokenOutput",
    "check_grammar",
    "check_prompt_scores",
    "compilers",
    "grammar_limits",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from .engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
