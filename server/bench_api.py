"""The streaming endpoints `xlane bench serve` can ask, and where each says how many tokens it read and made.

Knows HTTP bodies of three families of servers; nothing of load, connections or times.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Counts = Callable[[Mapping[str, Any]], tuple[int, int]]
"""Last event of a stream -> (prompt tokens, output tokens)."""


@dataclass(frozen=True, slots=True)
class Api:
    """How one kind of server is asked, and where it says what it did."""

    path: str
    body: Callable[[str, int, str], dict[str, Any]]
    """(prompt, output tokens, model) -> body"""
    counts: Counts
    tokenize: Callable[[str], dict[str, Any]]


# TGI's field, llama.cpp's and vLLM's: each server takes its own and ignores the others.
def _any_tokenize(text: str) -> dict[str, Any]:
    return {"inputs": text, "content": text, "prompt": text, "add_special": True}


_OPENAI = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}


def _usage(last: Mapping[str, Any]) -> tuple[int, int]:
    return last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]


APIS = {
    "openai": Api(
        "/v1/completions",
        lambda prompt, tokens, model: {"model": model, "prompt": prompt, "max_tokens": tokens, **_OPENAI},
        _usage,
        _any_tokenize,
    ),
    "chat": Api(
        "/v1/chat/completions",
        lambda prompt, tokens, model: {
            "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, **_OPENAI,
        },
        _usage,
        _any_tokenize,
    ),
    "tgi": Api(
        "/generate_stream",
        lambda prompt, tokens, model: {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "details": True}},
        lambda last: (last["details"].get("input_length") or 0, last["details"]["generated_tokens"]),
        lambda text: {"inputs": text},
    ),
    "llama.cpp": Api(
        "/completion",
        lambda prompt, tokens, model: {
            "prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        },
        lambda last: (last["tokens_evaluated"], last["tokens_predicted"]),
        lambda text: {"content": text, "add_special": True},
    ),
}  # fmt: skip


def merged(body: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`body` changed by `extra` as JSON Merge Patch (RFC 7396) says: null takes a field away, objects are merged."""
    both = dict(body)
    for name, value in extra.items():
        inner = body.get(name)
        both[name] = (
            merged(inner if isinstance(inner, dict) else {}, value) if isinstance(value, dict) else value
        )
    return {name: value for name, value in both.items() if value is not None}
