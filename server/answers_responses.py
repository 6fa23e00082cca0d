"""What `/v1/responses` answers, as types: for the API's description and for tests. The route builds plain values."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class _Answer(msgspec.Struct, kw_only=True):
    """Base of all answers."""


class OutputPart(_Answer, kw_only=True):
    """The text of an item: of type `output_text`, or `reasoning_text` without the rest."""

    type: str
    text: str
    annotations: list[dict[str, Any]] | UnsetType = UNSET
    logprobs: list[dict[str, Any]] | UnsetType = UNSET


class OutputItem(_Answer, kw_only=True):
    """A `message`, the `reasoning` before it, or a `function_call`."""

    id: str
    type: str
    status: str
    content: list[OutputPart] | UnsetType = UNSET
    role: str | UnsetType = UNSET
    summary: list[OutputPart] | UnsetType = UNSET
    encrypted_content: UnsetType | None = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class InputTokensDetails(_Answer, kw_only=True):
    """How many tokens of the input were found in the cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(_Answer, kw_only=True):
    """How many generated tokens were thinking."""

    reasoning_tokens: int


class ResponseUsage(_Answer, kw_only=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(_Answer, kw_only=True):
    """Why a response is not whole."""

    reason: str


class ResponseError(_Answer, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class ResponseReasoning(_Answer, kw_only=True):
    """What was asked about thinking."""

    effort: str | None
    summary: None


class ModelResponse(_Answer, kw_only=True):
    """`/v1/responses`."""

    id: str
    object: str
    created_at: int
    completed_at: int | None
    status: str
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    model: str
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ResponseReasoning
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None


class ResponseEvent(_Answer, kw_only=True):
    """One event of a streamed response; which fields it has, its type says."""

    type: str
    sequence_number: int
    response: ModelResponse | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputPart | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[dict[str, Any]] | UnsetType = UNSET
