"""What a program asks of a model and what it gets, as plain values: `LLM`'s side of the OpenAI bodies. Knows no engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar, Unpack

import msgspec

from ..engine import Timing
from .errors import Invalid
from .generate import TextToken
from .openai_run import Answer, Prompt
from .options import did_you_mean
from .reader import Call, openai_finish
from .schema_openai import ChatBody, CompletionBody

B = TypeVar("B", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is generated. Each field means what the field of this name means in the HTTP API."""

    max_tokens: int | None = None
    """Most tokens to generate; None is as many as fit."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    """The same seed gives the same tokens again; None draws one for each prompt."""
    stop: str | Sequence[str] = ()
    """Texts that end the answer, and are no part of it."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None
    """Token id -> what is added to its logit."""
    logprobs: int | None = None
    """Report log-probabilities, with this many alternatives a token; None reports none."""
    guided_json: Mapping[str, Any] | None = None
    """A JSON schema the answer must match."""
    guided_regex: str | None = None
    guided_choice: Sequence[str] | None = None
    """Texts of which the answer must be one."""
    guided_grammar: str | None = None
    """A grammar in Lark or GBNF the answer must match."""


class ChatOptions(TypedDict, total=False):
    """What a chat may ask for besides, in the form of `/v1/chat/completions`."""

    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    chat_template_kwargs: Mapping[str, Any]
    reasoning_effort: str
    continue_final_message: bool
    """Go on with the last message instead of answering it."""
    add_generation_prompt: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    """Without thinking and calls of tools."""
    finish_reason: str
    """`stop` (the model's own end or a stop text), `length` (`max_tokens` is used up) or `tool_calls`."""
    tokens: tuple[TextToken, ...]
    """All that were generated, the one that ended it included."""
    prompt_ids: tuple[int, ...]
    cached_tokens: int
    """Of the prompt, found in the cache."""
    reasoning: str = ""
    """A chat model's thinking."""
    calls: tuple[Call, ...] = ()
    """Of tools, in order."""
    timing: Timing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one turn of the engine brought to an answer."""

    text: str
    """More of the answer; all of them together are `Completion.text`."""
    reasoning: str = ""
    tokens: tuple[TextToken, ...] = ()
    calls: tuple[Call, ...] = ()
    """All calls of tools, on the last delta."""
    finish_reason: str | None = None
    """Set on the last delta only."""


def completion_body(prompt: str | Sequence[int], sampling: Sampling) -> CompletionBody:
    """The body of `/v1/completions` that asks the same. Raises Invalid."""
    return _body(CompletionBody, prompt=prompt, logprobs=sampling.logprobs, **_shared(sampling))


def chat_body(
    messages: Sequence[Mapping[str, Any]], sampling: Sampling, **options: Unpack[ChatOptions]
) -> ChatBody:
    """The body of `/v1/chat/completions` that asks the same. Raises Invalid."""
    known = list(ChatOptions.__annotations__)
    for name in options:
        if name not in known:
            raise Invalid(
                f"a chat has no option {name}{did_you_mean(name, known) or ': ' + ', '.join(known)}"
            )
    scores = {} if sampling.logprobs is None else {"logprobs": True, "top_logprobs": sampling.logprobs}
    return _body(ChatBody, messages=messages, **scores, **_shared(sampling), **options)


def completion_of(prompt: Prompt, answer: Answer, tokens: Sequence[TextToken]) -> Completion:
    """An answer that has come to its end."""
    done = answer.done
    return Completion(
        text=answer.text,
        finish_reason=openai_finish(done, len(answer.calls)),
        tokens=tuple(tokens),
        prompt_ids=tuple(prompt.ids),
        cached_tokens=done.cached_tokens,
        reasoning=answer.reasoning,
        calls=tuple(answer.calls),
        timing=done.timing,
    )


def _shared(sampling: Sampling) -> dict[str, Any]:
    return {f.name: getattr(sampling, f.name) for f in fields(Sampling) if f.name != "logprobs"}


def _body(kind: type[B], **given: Any) -> B:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise Invalid(str(error)) from None
