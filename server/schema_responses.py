"""The body of OpenAI's `POST /v1/responses`. Unknown fields are ignored, null means absent. Checks shapes only.

Fields that ask for what this server cannot do stand here as `Any`, to be refused by name. Nothing is ever stored, so
`store` changes nothing and is not named; answers say `store: false`.
"""

from typing import Any

import msgspec

from .schema_openai import ContentPart, Sampling


class Item(msgspec.Struct, frozen=True):
    """One item of `input`: a message, if its type does not say otherwise."""

    type: str | None = None
    role: str | None = None
    content: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    """Of reasoning."""
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    """Of a function call."""
    output: str | list[ContentPart] | None = None
    """Of a function, as an answer to a call."""


class Reasoning(msgspec.Struct, frozen=True):
    """How to think. A `summary` is never written, as its definition allows."""

    effort: str | None = None


class TextOptions(msgspec.Struct, frozen=True):
    """What the text has to look like."""

    format: Any = None


class ResponsesBody(Sampling, frozen=True, kw_only=True):
    """`POST /v1/responses`."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    parallel_tool_calls: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: Any = None
