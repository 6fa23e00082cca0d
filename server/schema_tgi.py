"""The bodies of TGI's native routes. Unknown fields are ignored, null means absent, everywhere. Checks shapes only."""

from typing import Any

import msgspec

from .schema_openai import Message


class GenerateParameters(msgspec.Struct, frozen=True, kw_only=True):
    """`parameters` of a generation; what each does and its range: validate_tgi.py. `priority` and `timeout` are not TGI's."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: str | list[str] | None = None
    truncate: int | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Any = None
    adapter_id: str | None = None
    priority: int | None = None
    timeout: float | None = None


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /generate`, `/generate_stream` and `/`; `stream` counts on `/` only."""

    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /tokenize`: `inputs` is answered as TGI does, `prompt` as vLLM does, and `messages`, a chat."""

    model: str | None = None
    inputs: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /detokenize`: ids, under either name."""

    tokens: list[int] | None = None
    ids: list[int] | None = None
    skip_special_tokens: bool | None = None
