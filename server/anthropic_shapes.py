"""The values Anthropic's answers are made of: the message, its blocks, usage, why it ended. Knows no HTTP."""

import json
import os
from typing import Any, Literal

from .embedded import embedded
from .generate import Done, Ending
from .openai_run import Job
from .reader import Call, calls_tools
from .schema_anthropic import MessagesBody

Kind = Literal["thinking", "text"]


def block(kind: Kind, text: str) -> dict[str, Any]:
    """One block of an answer. Thoughts are not signed: nobody has to prove here that they are the model's."""
    return {"type": "text", "text": text} if kind == "text" else {"type": kind, kind: text, "signature": ""}


def call_block(identity: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call of a tool."""
    return {"type": "tool_use", "id": identity, "name": name, "input": arguments}


def whole_call(call: Call) -> dict[str, Any]:
    """A call with its arguments, which are an object here; what was cut off before its end is none."""
    try:
        arguments: Any = embedded(json.loads(call.arguments, strict=False))
    except (ValueError, RecursionError):
        arguments = {}
    return call_block(call.id, call.name, arguments)


def message(job: Job, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    """A message whose end is not known yet."""
    return {
        "id": f"msg_{os.urandom(16).hex()}",
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def usage_of(
    job: Job, cached_tokens: int, output_tokens: int = 0, thinking_tokens: int | None = None
) -> dict[str, Any]:
    """`usage`; here, what was found in the cache is no part of `input_tokens`."""
    usage: dict[str, Any] = {
        "input_tokens": job.prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }
    if thinking_tokens is not None:
        usage["output_tokens_details"] = {"thinking_tokens": thinking_tokens}
    return usage


def ending_of(job: Job, body: MessagesBody, done: Done, calls: int) -> dict[str, Any]:
    """Why it ended."""
    reason = "end_turn"
    if calls_tools(done, calls):
        reason = "tool_use"
    elif done.ending is Ending.STOP:
        reason = "stop_sequence"
    elif done.ending is Ending.LENGTH:
        cut = job.prompts[0].max_tokens < body.max_tokens
        reason = "model_context_window_exceeded" if cut else "max_tokens"
    return {"stop_reason": reason, "stop_sequence": done.stop}
