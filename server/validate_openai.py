"""The rules of the OpenAI routes' parameters. Every refusal names its parameter. Knows no prompt but its length."""

from typing import TypeVar

from ..engine import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, EngineInfo, LogprobsMode, SamplingParams
from .config import ServerConfig
from .errors import Invalid, NoSuchModel, TooLong
from .forms import form_of, text_format
from .schema_openai import ChatBody, CompletionBody, Sampling
from .schema_responses import ResponsesBody
from .unsupported import CHAT, COMPLETION, RESPONSES, refuse
from .validate import (
    GREEDY_BELOW,
    MAX_SEED,
    Checked,
    Terms,
    check_prompt_logprobs,
    check_terms,
    is_float32,
    random_seed,
    room_left,
)

N = TypeVar("N", int, float)

ANY_MODEL = ("", "tgi", "dummy")
"""Names clients send when they mean "whatever is served"."""
INCLUDED_SCORES = "message.output_text.logprobs"
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0


def check_chat(body: ChatBody, config: ServerConfig, info: EngineInfo, eos_ids: tuple[int, ...]) -> Checked:
    """Chat parameters → `Checked`. Raises Invalid, Unsupported."""
    refuse(body, CHAT)
    top = between("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if top is not None and not body.logprobs:
        raise Invalid("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    choices = _choices("n", body.n, config)
    wanted = ("max_completion_tokens", body.max_completion_tokens)
    if body.max_completion_tokens is None:
        wanted = ("max_tokens", body.max_tokens)
    return _checked(
        body,
        sampling_of(body, info, eos_ids, bool(body.logprobs), top or 0),
        max_tokens=between(*wanted, 1, None),
        prompt_logprobs=_prompt_logprobs(body, config),
        choices=choices,
        keep=choices,
        config=config,
    )


def check_completion(
    body: CompletionBody, config: ServerConfig, info: EngineInfo, eos_ids: tuple[int, ...]
) -> Checked:
    """Completion parameters → `Checked`. Raises Invalid, Unsupported."""
    refuse(body, COMPLETION)
    keep = _choices("n", body.n, config)
    choices = keep if body.best_of is None else _choices("best_of", body.best_of, config)
    if choices < keep:
        raise Invalid(f"`best_of` must be at least `n`. Given: {choices} and {keep}", param="best_of")
    if choices > keep and body.stream:
        raise Invalid("`best_of` greater than `n` cannot be streamed", param="best_of")
    top = between("logprobs", body.logprobs, 0, MAX_TOP_LOGPROBS)
    prompt_logprobs = _prompt_logprobs(body, config)
    if body.echo and top is not None:
        check_prompt_logprobs("echo", config)
        prompt_logprobs = max(top, prompt_logprobs or 0)
    # A prompt can be told of, and scored, without going on from it.
    least = 0 if body.echo or prompt_logprobs is not None else 1
    return _checked(
        body,
        # Which of several sequences are best is told from their log-probabilities, wanted in the answer or not.
        sampling_of(body, info, eos_ids, top is not None or choices > keep, top or 0),
        max_tokens=between("max_tokens", body.max_tokens, least, None),
        prompt_logprobs=prompt_logprobs,
        choices=choices,
        keep=keep,
        config=config,
    )


def check_responses(body: ResponsesBody, info: EngineInfo, eos_ids: tuple[int, ...]) -> Checked:
    """A response's parameters → `Checked`. Raises Invalid, Unsupported."""
    refuse(body, RESPONSES)
    top = between("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
    scored = scores_of(body)
    if top and not scored:
        raise Invalid(f'`top_logprobs` needs `include: ["{INCLUDED_SCORES}"]`', param="top_logprobs")
    return Checked(
        sampling=sampling_of(body, info, eos_ids, scored, top or 0),
        max_tokens=between("max_output_tokens", body.max_output_tokens, 1, None),
        include_stop=False,
        terms=terms_of(body),
        form=text_format(body.text.format if body.text else None, "text.format"),
    )


def scores_of(body: ResponsesBody) -> bool:
    """Whether a response is to have the log-probabilities of its text. What else may be included, other features would make."""
    return INCLUDED_SCORES in (body.include or ())


def check_model(name: str | None, served: str, info: EngineInfo) -> str:
    """The adapter that is asked for by its name, "" for the model as it is. Raises NoSuchModel for a name that asks for
    something else than what is served."""
    if name is None or name in (*ANY_MODEL, served, info.model_id):
        return ""
    if name not in info.adapters:
        there = ", ".join(repr(one) for one in (served, *info.adapters))
        raise NoSuchModel(f"The model {name[:200]!r} does not exist; this server has {there}", param="model")
    return name


def check_length(
    prompt_tokens: int, max_tokens: int | None, info: EngineInfo, param: str, wanted: str = "max_tokens"
) -> int:
    """How many tokens to generate after this prompt. Raises TooLong.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: tokens asked for; None means as many as fit.
        info: has the limits.
        param: where the prompt came from.
        wanted: where the number of tokens came from.
    """
    room = room_left(prompt_tokens, info)
    # Clients look for this wording.
    limit = f"This model's maximum context length is {info.max_total_tokens} tokens."
    if prompt_tokens > info.max_input_tokens or room < 1:
        raise TooLong(
            f"{limit} However, your {param} resulted in {prompt_tokens} tokens, and at most "
            f"{info.max_input_tokens} can be a prompt. Please reduce the length of the {param}.",
            param=param,
        )
    if max_tokens is not None and max_tokens > room:
        raise TooLong(
            f"{limit} However, you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the {param}, "
            f"{max_tokens} in the completion). Please reduce the length of the {param} or completion.",
            param=wanted,
        )
    return room if max_tokens is None else max_tokens


def too_long_unread(info: EngineInfo, characters: int, param: str) -> TooLong:
    """The error for a text that cannot fit, whatever its tokens are."""
    return TooLong(
        f"This model's maximum context length is {info.max_total_tokens} tokens. However, your {param} has "
        f"{characters} characters. Please reduce the length of the {param}.",
        param=param,
    )


def _checked(
    body: ChatBody | CompletionBody,
    sampling: SamplingParams,
    *,
    max_tokens: int | None,
    prompt_logprobs: int | None,
    choices: int,
    keep: int,
    config: ServerConfig,
) -> Checked:
    if body.stream_options is not None and not body.stream:
        raise Invalid("`stream_options` needs `stream: true`", param="stream_options")
    return Checked(
        sampling=sampling,
        max_tokens=max_tokens,
        stops=stops_of(body.stop, config),
        include_stop=bool(body.include_stop_str_in_output),
        form=form_of(body),
        terms=terms_of(body),
        prompt_logprobs=prompt_logprobs,
        choices=choices,
        keep=keep,
    )


def _prompt_logprobs(body: ChatBody | CompletionBody, config: ServerConfig) -> int | None:
    wanted = between("prompt_logprobs", body.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
    if wanted is not None:
        check_prompt_logprobs("prompt_logprobs", config)
        if body.stream:
            raise Invalid("`prompt_logprobs` cannot be streamed", param="prompt_logprobs")
    return wanted


def sampling_of(
    body: Sampling, info: EngineInfo, eos_ids: tuple[int, ...], logprobs: bool = False, top: int = 0
) -> SamplingParams:
    """How tokens are picked. Raises Invalid."""
    temperature = between("temperature", body.temperature, 0.0, MAX_TEMPERATURE)
    top_p = between("top_p", body.top_p, 0.0, 1.0)
    typical_p = between("typical_p", body.typical_p, 0.0, 1.0)
    greedy = (temperature is not None and temperature < GREEDY_BELOW) or top_p == 0.0 or typical_p == 0.0
    repetition = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    if not (repetition > 0.0 and is_float32(repetition)):
        raise Invalid("`repetition_penalty` must be greater than 0", param="repetition_penalty")
    return SamplingParams(
        max_tokens=1,
        temperature=0.0 if greedy else 1.0 if temperature is None else temperature,
        # 0 and −1 both mean off where this extension comes from.
        top_k=max(0, between("top_k", body.top_k, -1, 2**31 - 1) or 0),
        # A 0 keeps the likeliest token only, which is what greedy does.
        top_p=top_p or 1.0,
        min_p=between("min_p", body.min_p, 0.0, 1.0) or 0.0,
        typical_p=typical_p or 1.0,
        repetition_penalty=repetition,
        frequency_penalty=between("frequency_penalty", body.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        or 0.0,
        presence_penalty=between("presence_penalty", body.presence_penalty, -MAX_PENALTY, MAX_PENALTY) or 0.0,
        seed=_seed(body.seed),
        stop_ids=_stop_ids(body, info, eos_ids),
        logprobs=logprobs,
        top_logprobs=top,
        logprobs_mode=LogprobsMode.RAW,
        min_tokens=between("min_tokens", body.min_tokens, 0, None) or 0,
        logit_bias=_logit_bias(body.logit_bias or {}, info),
    )


def terms_of(body: Sampling) -> Terms:
    """On which terms a request is served. Raises Invalid."""
    return check_terms(body.priority, body.timeout, body.cache_salt)


def _seed(seed: int | None) -> int:
    if seed is None:
        return random_seed()
    if not -(2**63) <= seed <= MAX_SEED:
        raise Invalid("`seed` must fit 64 bits", param="seed")
    return seed & MAX_SEED


def _logit_bias(biases: dict[int, float], info: EngineInfo) -> tuple[tuple[int, float], ...]:
    param = "logit_bias"
    if len(biases) > MAX_LOGIT_BIAS:
        raise Invalid(f"`{param}` takes at most {MAX_LOGIT_BIAS} tokens. Given: {len(biases)}", param=param)
    for token, bias in biases.items():
        if not 0 <= token < info.vocab_size:
            raise Invalid(f"`{param}` has token id {token} outside 0 … {info.vocab_size - 1}", param=param)
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise Invalid(
                f"`{param}` of token {token} must be between {-MAX_BIAS} and {MAX_BIAS}. Given: {bias}",
                param=param,
            )
    return tuple(biases.items())


def _stop_ids(body: Sampling, info: EngineInfo, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    extra = tuple(body.stop_token_ids or ())
    if len(extra) > 16 or any(not 0 <= token < info.vocab_size for token in extra):
        raise Invalid(
            f"`stop_token_ids` takes at most 16 ids below {info.vocab_size}", param="stop_token_ids"
        )
    return extra if body.ignore_eos else (*eos_ids, *extra)


def stops_of(stop: str | list[str] | None, config: ServerConfig, name: str = "stop") -> tuple[str, ...]:
    """Stop strings, under the name their sender has for them. Raises Invalid."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > config.max_stop_sequences:
        raise Invalid(
            f"`{name}` takes at most {config.max_stop_sequences} strings. Given: {len(stops)}", param=name
        )
    if any(not 0 < len(text) <= config.max_stop_chars for text in stops):
        raise Invalid(
            f"Each string of `{name}` must have between 1 and {config.max_stop_chars} characters", param=name
        )
    return stops


def _choices(name: str, value: int | None, config: ServerConfig) -> int:
    return between(name, value, 1, config.max_choices) or 1


def between(name: str, value: N | None, low: N, high: N | None) -> N | None:
    """The value, if it is absent or in range. Raises Invalid."""
    if value is None or (value >= low and (high is None or value <= high)):
        return value
    limits = f"at least {low}" if high is None else f"between {low} and {high}"
    raise Invalid(f"`{name}` must be {limits}. Given: {value}", param=name)
