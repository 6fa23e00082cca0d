"""The values a response of the Responses API is made of: the response itself, its items, their parts. Knows no HTTP."""

import os
import time
from collections.abc import Iterable
from typing import Any, Literal

from .embedded import embedded
from .generate import Done, Ending, TextToken
from .openai_run import Job
from .openai_shapes import chat_logprobs
from .schema_responses import ResponsesBody

Kind = Literal["reasoning", "message"]
_PREFIX = {"reasoning": "rs_", "message": "msg_"}
CALL_PREFIX = "fc_"
_TOOL = {"type": "function", "description": None, "parameters": None, "strict": False}


def new_id(prefix: str) -> str:
    """An id nobody else has."""
    return prefix + os.urandom(16).hex()


def item_id(kind: Kind) -> str:
    """The id of a new item."""
    return new_id(_PREFIX[kind])


def part(kind: Kind, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """An item's one part. `logprobs`: of a message, if they are wanted."""
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def logprobs_of(job: Job, tokens: Iterable[TextToken]) -> list[dict[str, Any]]:
    """Log-probabilities as a response has them: without null for the bytes of what is no text by itself."""
    content: list[dict[str, Any]] = chat_logprobs(job.serving.tokenizer, tokens)["content"]
    for token in content:
        for entry in (token, *token["top_logprobs"]):
            entry["bytes"] = entry["bytes"] or []
    return content


def item(kind: Kind, identity: str, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """An item of the output."""
    start: dict[str, Any] = {"id": identity, "type": kind, "status": status}
    if kind == "reasoning":
        return {**start, "summary": [], "content": parts, "encrypted_content": None}
    return {**start, "role": "assistant", "content": parts}


def call_item(identity: str, status: str, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool, which is an item of its own."""
    return {
        "id": identity,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


class Envelope:
    """One response, at whatever stage it is."""

    def __init__(self, job: Job, body: ResponsesBody) -> None:
        self._job = job
        self._fixed = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": job.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": embedded(_format(body))},
            "tool_choice": "auto" if body.tool_choice is None else embedded(body.tool_choice),
            "tools": embedded([{**_TOOL, **tool} for tool in body.tools or ()]),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def running(self) -> dict[str, Any]:
        """Before there is any output."""
        return self._at("in_progress", [])

    def finished(self, done: Done, output: list[dict[str, Any]], reasoning_tokens: int) -> dict[str, Any]:
        """At its end, whole or cut by the number of tokens."""
        status = status_of(done)
        prompt = self._job.prompt_tokens
        return {
            **self._at(status, output),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": done.tokens,
                "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
                "total_tokens": prompt + done.tokens,
            },
        }

    def failed(self, error: dict[str, str], output: list[dict[str, Any]]) -> dict[str, Any]:
        """Broken off."""
        return {**self._at("failed", output), "error": error}

    def _at(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._fixed,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": output,
            "usage": None,
        }


def _format(body: ResponsesBody) -> dict[str, Any]:
    """What was asked for, as clients read it back."""
    given = body.text.format if body.text is not None else None
    return {"type": "text"} if given is None else {**given, "strict": given.get("strict")}


def status_of(done: Done) -> Literal["completed", "incomplete"]:
    """What became of a response that did not fail."""
    return "incomplete" if done.ending is Ending.LENGTH else "completed"
