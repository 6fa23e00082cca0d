"""The bodies of the OpenAI routes. Unknown fields are ignored, null means absent. Checks shapes only.

Fields this server has no effect for yet stand here as `Any`, so that `unsupported.py` can refuse them by name. Fields
that never change an answer (`user`, `store`, `metadata`, `service_tier`, `prompt_cache_key`, `safety_identifier`,
`verbosity`, `prediction`, …) are not named and so ignored, as their definition allows.
"""

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    """One more chunk, with the usage."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are picked and when, the same on every route that is not TGI's own. `min_p`, `typical_p`,
    `repetition_penalty`, `ignore_eos`, `min_tokens`, `stop_token_ids` and `priority` are extensions under the names other
    servers gave them; `top_k` is one in OpenAI's APIs; `timeout` is ours."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[int, float] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout: float | None = None


class _Completing(Sampling, frozen=True, kw_only=True):
    """What chat and completions share."""

    max_tokens: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: Any = None
    length_penalty: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    truncate_prompt_tokens: Any = None
    skip_special_tokens: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    """A call, as it was told before there were tools."""
    reasoning: str | None = None
    reasoning_content: str | None = None
    """Its thinking, under either of the names clients found it by."""


class ChatBody(_Completing, frozen=True, kw_only=True):
    """`POST /v1/chat/completions` and `/chat_tokenize`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    echo: Any = None
    documents: Any = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    tool_prompt: str | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None


class CompletionBody(_Completing, frozen=True, kw_only=True):
    """`POST /v1/completions`. `prompt` is a text, a list of texts, token ids, or a list of lists of token ids."""

    prompt: str | list[str | int | list[int]]
    add_special_tokens: bool | None = None
    """Whether a text begins as the model's sequences do; yes, unless it is said."""
    best_of: int | None = None
    logprobs: int | None = None
    suffix: Any = None
    echo: bool | None = None
