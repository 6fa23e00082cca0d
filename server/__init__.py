"""Text and HTTP: schemas, chat templates, streaming, metrics, command line. Knows JSON and strings, never jax.

What a program may use is loaded when it is first asked for: `from xlane.server import LLM`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import Incomplete, Invalid, NotReady, ServerError, TemplateFailed, TooLong, Unsupported
    from .generate import TextToken
    from .llm import LLM
    from .options import UsageError
    from .reader import Call
    from .sampling import Completion, Delta, Sampling

__all__ = [
    "LLM",
    "Call",
    "Completion",
    "Delta",
    "Incomplete",
    "Invalid",
    "NotReady",
    "Sampling",
    "ServerError",
    "TemplateFailed",
    "TextToken",
    "TooLong",
    "Unsupported",
    "UsageError",
]

_HOMES = {
    "LLM": "llm",
    "Call": "reader",
    "TextToken": "generate",
    "UsageError": "options",
    **dict.fromkeys(("Completion", "Delta", "Sampling"), "sampling"),
}
"""Name -> the module it comes from, if that is not `errors`."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
