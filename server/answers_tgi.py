"""What the native routes and the platforms' routes answer, as types: for the API's description and for tests.

The routes build these answers as plain values, which is quicker; tests hold the two together.
"""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType


class _Answer(msgspec.Struct, kw_only=True):
    """Base of all answers: nothing in them but what is named."""


class Token(_Answer, kw_only=True):
    """One token. `logprob` is null where none was computed, or where it is not finite."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(_Answer, kw_only=True):
    """One token of the prompt. The first has no log-probability, for nothing comes before it."""

    id: int
    text: str
    logprob: float | None


class SequenceDetails(_Answer, kw_only=True):
    """How a sequence came about."""

    finish_reason: Annotated[
        str, msgspec.Meta(extra_json_schema={"enum": ["length", "eos_token", "stop_sequence"]})
    ]
    generated_tokens: int
    seed: int | None
    """Null for a greedy sequence, which needs none."""
    prefill: list[PrefillToken]
    """Empty unless `decoder_input_details` asked for it."""
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class BestOfSequence(SequenceDetails, kw_only=True):
    """A sequence that was not the best."""

    generated_text: str


class Details(SequenceDetails, kw_only=True):
    """Details of the best sequence, and with `best_of` of the others."""

    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET


class Generated(_Answer, kw_only=True):
    """`/generate`; `POST /` answers a list of one."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(_Answer, kw_only=True):
    """Details of a stream's sequence."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamEvent(_Answer, kw_only=True):
    """One event of `/generate_stream`; the last has the whole text. There is no `[DONE]`."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None
    details: StreamDetails | None


class TokenSpan(_Answer, kw_only=True):
    """One token of a given text, with its place in bytes."""

    id: int
    text: str
    start: int
    stop: int


class TokenIds(_Answer, kw_only=True):
    """`/tokenize` of a `prompt`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer, kw_only=True):
    """`/detokenize`: the text, under both names that clients look for."""

    text: str
    prompt: str


class ChatTokens(_Answer, kw_only=True):
    """`/chat_tokenize`."""

    tokenize_response: list[TokenSpan]
    templated_text: str


class Info(_Answer, kw_only=True):
    """`/info`: what is served and with which limits."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    model_dtype: str
    model_device_type: str
    model_device_kind: str
    model_device_count: int
    programs: int
    """Compiled before the first request, so that none is compiled after."""
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_batch_size: int
    speculate: int
    """Tokens guessed at a time."""
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class Problem(_Answer, kw_only=True):
    """What went wrong, on every route that is not OpenAI's."""

    error: str
    error_type: str


class Predictions(_Answer, kw_only=True):
    """`/vertex`: a text for each instance, or what `/generate` answers if it asked for details."""

    predictions: list[str | Generated]


class KServeMetadata(_Answer, kw_only=True):
    """The server, or a model."""

    name: str
    version: str
    extensions: list[str]


class Alive(_Answer, kw_only=True):
    """KServe's probes. `ready` and its `error` are told by the probes of readiness only."""

    live: bool
    ready: bool | UnsetType = UNSET
    error: str | UnsetType = UNSET


class OutputTensor(_Answer, kw_only=True):
    """Texts, or the UTF-8 bytes of one, as its input was."""

    name: str
    shape: list[int]
    datatype: str
    data: list[str | int]


class Inferred(_Answer, kw_only=True):
    """`/v2/models/{model}/infer`."""

    id: str | None
    model_name: str
    outputs: list[OutputTensor]


ApiDescription = dict[str, Any]
"""An OpenAPI document."""
