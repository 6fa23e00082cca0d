"""What every route is for, takes and answers: one entry per handler. Where a route lies is app.py's table alone.

A handler without an entry is still described, by its docstring. Data, nothing else; `openapi.py` makes the document.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import adapters, anthropic, docs, kserve, misc, native, openai_models, sagemaker, tokens, vertex
from . import answers_anthropic as claude
from . import answers_openai as openai
from . import answers_tgi as tgi
from .answers_responses import ModelResponse, ResponseEvent
from .openai_chat import chat_completions
from .openai_completions import completions
from .responses import responses
from .schema_adapters import LoadAdapterBody, UnloadAdapterBody
from .schema_anthropic import CountBody, MessagesBody
from .schema_openai import ChatBody, CompletionBody
from .schema_platforms import InferBody, VertexBody
from .schema_responses import ResponsesBody
from .schema_tgi import DetokenizeBody, GenerateBody, TokenizeBody
from .ui import routes as ui
from .ui.shapes import Lanes

TEXT, HTML, PROMETHEUS = "text/plain", "text/html", "text/plain; version=0.0.4"
CSS, JAVASCRIPT = "text/css", "text/javascript"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One thing the server does over HTTP."""

    group: str
    summary: str
    body: Any = None
    """Type of the JSON body; None for a route that reads none."""
    answer: Any = None
    """Type of the JSON answer; None for an empty or another one."""
    media: str = ""
    """Of an answer that is no JSON; an empty answer if this and `answer` are absent."""
    event: Any = None
    """Type of the events, for a route that can stream."""
    always_streams: bool = False
    generates: bool = False
    """Whether the engine works for it, and so may fail it."""
    always: bool = False
    """Whether it is answered before there is an engine too."""
    query: Mapping[str, str] = field(default_factory=dict)
    """What may be asked for in the query, and what that is."""
    also: Mapping[int, Any] = field(default_factory=dict)
    """Further statuses and their bodies."""
    both_errors: bool = False
    """Errors take the shape of the API that the body belongs to."""
    example: Mapping[str, Any] | None = None


_MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
_NATIVE = {"inputs": "The sky is blue because", "parameters": {"max_new_tokens": 20}}
_STREAMED = {**_NATIVE, "parameters": {"max_new_tokens": 20, "details": True}}
_CHAT = {"messages": _MESSAGES, "max_tokens": 20}
_TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["The sky is blue because"]}
_INFER = {"inputs": [_TENSOR], "parameters": {"max_new_tokens": 20}}

OPERATIONS: Mapping[Callable[..., Any], Operation] = {
    chat_completions: Operation(
        group="OpenAI", summary="Answer a conversation", body=ChatBody, answer=openai.ChatCompletion,
        event=openai.ChatChunk, generates=True, example=_CHAT,
    ),
    completions: Operation(
        group="OpenAI", summary="Go on with a text", body=CompletionBody, answer=openai.Completion,
        event=openai.Completion, generates=True, example={"prompt": "The sky is blue because", "max_tokens": 20},
    ),
    responses: Operation(
        group="OpenAI", summary="Answer, in items", body=ResponsesBody, answer=ModelResponse, event=ResponseEvent,
        generates=True, example={"input": "Why is the sky blue?", "max_output_tokens": 20},
    ),
    anthropic.messages: Operation(
        group="Anthropic", summary="Answer a conversation", body=MessagesBody, answer=claude.AssistantTurn,
        event=claude.MessageEvent, generates=True, example=_CHAT,
    ),
    anthropic.count_tokens: Operation(
        group="Anthropic", summary="How many tokens a conversation has", body=CountBody, answer=claude.TokenCount,
        also={404: claude.AnthropicProblem}, example={"messages": _MESSAGES},
    ),
    openai_models.list_models: Operation(group="OpenAI", summary="List the models", answer=openai.ModelList),
    openai_models.show_model: Operation(
        group="OpenAI", summary="Describe a model", answer=openai.Model, also={404: openai.OpenAIProblem}
    ),
    adapters.load_adapter: Operation(
        group="Operation", summary="Serve another LoRA adapter, as in vLLM", body=LoadAdapterBody, media=TEXT,
        also={503: openai.OpenAIProblem}, example={"lora_name": "law", "lora_path": "."},
    ),
    adapters.unload_adapter: Operation(
        group="Operation", summary="Serve a LoRA adapter no more, as in vLLM", body=UnloadAdapterBody, media=TEXT,
        also={404: openai.OpenAIProblem, 503: openai.OpenAIProblem}, example={"lora_name": "law"},
    ),
    native.generate: Operation(
        group="TGI", summary="Generate a text", body=GenerateBody, answer=tgi.Generated, generates=True,
        example=_NATIVE,
    ),
    native.generate_stream: Operation(
        group="TGI", summary="Generate a text, token by token", body=GenerateBody, event=tgi.StreamEvent,
        always_streams=True, generates=True, example=_STREAMED,
    ),
    native.compat: Operation(
        group="TGI", summary="Generate as the Hub's inference API does", body=GenerateBody,
        answer=list[tgi.Generated], event=tgi.StreamEvent, generates=True, example=_NATIVE,
    ),
    tokens.tokenize: Operation(
        group="TGI", summary="Tokens of a text", body=TokenizeBody, answer=list[tgi.TokenSpan] | tgi.TokenIds,
        example={"inputs": "The sky"},
    ),
    tokens.detokenize: Operation(
        group="TGI", summary="Text of tokens", body=DetokenizeBody, answer=tgi.Detokenized, example={"tokens": [84]}
    ),
    tokens.chat_tokenize: Operation(
        group="TGI", summary="A conversation as the model sees it", body=ChatBody, answer=tgi.ChatTokens,
        example={"messages": _MESSAGES},
    ),
    misc.info: Operation(group="TGI", summary="What is served, with which limits", answer=tgi.Info),
    misc.health: Operation(group="Operation", summary="Whether generations are served now", also={503: tgi.Problem}),
    misc.metrics: Operation(group="Operation", summary="Numbers for Prometheus", media=PROMETHEUS),
    docs.page: Operation(group="Operation", summary="This API, for people", media=HTML),
    ui.page: Operation(group="Operation", summary="A chat and the lanes, for people", media=HTML),
    ui.style: Operation(group="Operation", summary="How that page looks", media=CSS),
    ui.script: Operation(group="Operation", summary="What that page does", media=JAVASCRIPT),
    ui.lanes: Operation(
        group="Operation", summary="What every lane does now", answer=Lanes, also={404: tgi.Problem},
        query={"model": "One of several models"},
    ),
    docs.document: Operation(group="Operation", summary="This API, for programs", answer=tgi.ApiDescription, always=True),
    sagemaker.invocations: Operation(
        group="Platforms", summary="SageMaker: any of the bodies of `/`, chat and completions",
        body=GenerateBody | ChatBody | CompletionBody, event=tgi.StreamEvent | openai.ChatChunk | openai.Completion,
        answer=list[tgi.Generated] | openai.ChatCompletion | openai.Completion,
        generates=True, both_errors=True, example=_NATIVE,
    ),
    vertex.predict: Operation(
        group="Platforms", summary="Vertex AI: several generations at once", body=VertexBody, answer=tgi.Predictions,
        generates=True, example={"instances": [_NATIVE, _CHAT]},
    ),
    kserve.infer: Operation(
        group="Platforms", summary="KServe: several generations at once", body=InferBody, answer=tgi.Inferred,
        generates=True, example=_INFER,
    ),
    kserve.live: Operation(group="Platforms", summary="KServe: the process is alive", answer=tgi.Alive, always=True),
    kserve.ready: Operation(
        group="Platforms", summary="KServe: generations are served now", answer=tgi.Alive, also={503: tgi.Alive}
    ),
    kserve.metadata: Operation(group="Platforms", summary="KServe: the server", answer=tgi.KServeMetadata, always=True),
    kserve.model: Operation(group="Platforms", summary="KServe: the model", answer=tgi.KServeMetadata),
}  # fmt: skip
