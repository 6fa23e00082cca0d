"""What the OpenAI routes answer, as types: for the API's description and for tests. The routes build plain values."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class _Answer(msgspec.Struct, kw_only=True):
    """Base of all answers."""


class PromptTokensDetails(_Answer, kw_only=True):
    """How many prompt tokens were found in the cache."""

    cached_tokens: int


class CompletionTokensDetails(_Answer, kw_only=True):
    """How many generated tokens were thinking."""

    reasoning_tokens: int


class Usage(_Answer, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class LogprobEntry(_Answer, kw_only=True):
    """A token and its log-probability; `bytes` is null for one that is no text by itself."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(LogprobEntry, kw_only=True):
    """The chosen token, and the likeliest in its place."""

    top_logprobs: list[LogprobEntry]


class ChatLogprobs(_Answer, kw_only=True):
    """`logprobs` of a chat choice."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(_Answer, kw_only=True):
    """`logprobs` of a completion choice. The first token of an echoed prompt has none, for nothing comes before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(_Answer, kw_only=True):
    """A token that is in the prompt, or could be in its place."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""`prompt_logprobs`, by token id; null for the first token."""


class AssistantMessage(_Answer, kw_only=True):
    """The model's message; `reasoning` and `reasoning_content` are its thinking, where it thinks."""

    role: str
    content: str | None
    refusal: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType | None = UNSET
    function_call: dict[str, Any] | UnsetType = UNSET


class ChatChoice(_Answer, kw_only=True):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class _Frame(_Answer, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Frame, kw_only=True):
    """`/v1/chat/completions`."""

    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(_Answer, kw_only=True):
    """What a chunk adds to the message."""

    role: str
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType | None = UNSET
    function_call: dict[str, Any] | UnsetType = UNSET


class ChatChunkChoice(_Answer, kw_only=True):
    """A piece of one answer; the last has `finish_reason` and no text."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(_Frame, kw_only=True):
    """One event of a streamed chat. `[DONE]` comes last."""

    choices: list[ChatChunkChoice]
    usage: Usage | None


class CompletionChoice(_Answer, kw_only=True):
    """One text, or in a stream a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(_Frame, kw_only=True):
    """`/v1/completions`, whole or one event of its stream. `[DONE]` comes last."""

    choices: list[CompletionChoice]
    usage: Usage | None


class Model(_Answer, kw_only=True):
    """A model that is served, or an adapter, whose parent is the model that it adds to. The length of one that is not loaded is not
    known."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(_Answer, kw_only=True):
    """`/v1/models`."""

    object: str
    data: list[Model]


class OpenAIError(_Answer, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class OpenAIProblem(_Answer, kw_only=True):
    """The shape of errors on OpenAI's routes."""

    error: OpenAIError
