"""The bodies of TGI's native routes. Unknown fields are ignored, null means absent, everywhere. Checks shapes only."""

from typing import Any

import msgspec


class GenerateParameters(msgspec.Struct, frozen=True, kw_only=True):
    """`parameters` of a generation; what each does and its range: validate_tgi.py."""

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


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /generate`, `/generate_stream`, `/` and `/tokenize`; `stream` counts on `/` only."""

    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None
