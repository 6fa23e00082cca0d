"""The bodies of Anthropic's routes. Unknown fields are ignored, null means absent. Checks shapes only.

Fields that ask for what this server cannot do stand here as `Any`, to be refused by name. `metadata`, `service_tier`,
`cache_control` and the like never change an answer and are not named: prefixes are always cached.
"""

from typing import Any

import msgspec

from .schema_openai import Sampling


class Block(msgspec.Struct, frozen=True):
    """One block of a message's content."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    """Of a tool's call."""
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None
    """Of its result."""


class Turn(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: str
    content: str | list[Block]


class Thinking(msgspec.Struct, frozen=True):
    """Whether to think; `budget_tokens` is a wish that models cannot be held to."""

    type: str


class OutputConfig(msgspec.Struct, frozen=True):
    """What the answer has to look like."""

    effort: str | None = None
    format: Any = None


class CountBody(Sampling, frozen=True, kw_only=True):
    """`POST /v1/messages/count_tokens`, and what it shares with a message: all that the prompt is made of."""

    messages: list[Turn]
    system: str | list[Block] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Any = None
    """Where the form stood at first."""
    tools: Any = None
    tool_choice: Any = None
    mcp_servers: Any = None
    container: Any = None
    thread: Any = None


class MessagesBody(CountBody, frozen=True, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
