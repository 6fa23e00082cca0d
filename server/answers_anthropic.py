"""What Anthropic's routes answer, as types: for the API's description and for tests. The routes build plain values."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class _Answer(msgspec.Struct, kw_only=True):
    """Base of all answers."""


class AnswerBlock(_Answer, kw_only=True):
    """A `text`, the `thinking` before it, or a call of a tool (`tool_use`)."""

    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET


class ThinkingTokens(_Answer, kw_only=True):
    """How many generated tokens were thinking."""

    thinking_tokens: int


class MessageUsage(_Answer, kw_only=True):
    """Tokens of a message; those found in the cache are not counted again as `input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens | UnsetType = UNSET


class AssistantTurn(_Answer, kw_only=True):
    """`/v1/messages`."""

    id: str
    type: str
    role: str
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(_Answer, kw_only=True):
    """`/v1/messages/count_tokens`."""

    input_tokens: int


class MessageDelta(_Answer, kw_only=True):
    """What an event adds to a block, or to the message."""

    type: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: str | UnsetType = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class ErrorDetails(_Answer, kw_only=True):
    """What a program can go by."""

    error_code: str


class AnthropicError(_Answer, kw_only=True):
    """What went wrong."""

    type: str
    message: str
    details: ErrorDetails | UnsetType = UNSET


class MessageEvent(_Answer, kw_only=True):
    """One event of a streamed message; which fields it has, its type says."""

    type: str
    message: AssistantTurn | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: AnswerBlock | UnsetType = UNSET
    delta: MessageDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET
    error: AnthropicError | UnsetType = UNSET


class AnthropicProblem(_Answer, kw_only=True):
    """The shape of errors on Anthropic's routes."""

    type: str
    error: AnthropicError
