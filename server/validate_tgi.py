"""The rules of TGI's native parameters, in TGI's order and with TGI's sentences. Knows no prompt but its length.

On purpose not as TGI: `top_p` and `typical_p` may be 1 (off), a missing `parameters` object does not switch sampling
on, `frequency_penalty` is OpenAI's (TGI's depends on the other rows of the batch), unknown adapters are refused.
"""

from ..engine import EngineInfo, LogprobsMode, SamplingParams
from .config import ServerConfig
from .errors import Invalid, NoSuchModel
from .forms import tgi_form
from .schema_tgi import GenerateParameters
from .validate import (
    GREEDY_BELOW,
    MAX_SEED,
    Checked,
    check_prompt_logprobs,
    check_terms,
    is_float32,
    random_seed,
    room_left,
)

SLICE_TOKENS = 1024
"""TGI runs a long request in slices and checks the first only, so it takes any `max_new_tokens` beyond this."""


def check_parameters(
    parameters: GenerateParameters, config: ServerConfig, eos_ids: tuple[int, ...], *, streaming: bool
) -> Checked:
    """Native parameters → `Checked`. Raises Invalid, Unsupported."""
    if parameters.decoder_input_details:
        check_prompt_logprobs("decoder_input_details", config)
        if streaming:
            raise Invalid("`decoder_input_details` == true is not supported when streaming tokens")
    choices = _check_best_of(parameters, config, streaming=streaming)
    _check_ranges(parameters)
    stops = _check_stops(parameters.stop, config)
    if parameters.seed is not None and choices > 1:
        raise Invalid("`seed` must not be set when `best_of` > 1")
    top_n = _check_top_n(parameters.top_n_tokens, config)
    # Logprobs are in every streamed token and in `details`, and decide which of several sequences is the best.
    logprobs = streaming or details_wanted(parameters) or choices > 1
    return Checked(
        sampling=SamplingParams(
            max_tokens=1,
            temperature=_temperature(parameters),
            top_k=parameters.top_k or 0,
            top_p=1.0 if parameters.top_p is None else parameters.top_p,
            typical_p=1.0 if parameters.typical_p is None else parameters.typical_p,
            repetition_penalty=1.0
            if parameters.repetition_penalty is None
            else parameters.repetition_penalty,
            frequency_penalty=parameters.frequency_penalty or 0.0,
            seed=random_seed() if parameters.seed is None else parameters.seed,
            stop_ids=eos_ids,
            logprobs=logprobs,
            top_logprobs=top_n if logprobs else 0,
            logprobs_mode=LogprobsMode.PROCESSED,
            watermark=bool(parameters.watermark),
        ),
        max_tokens=parameters.max_new_tokens,
        stops=stops,
        form=tgi_form(parameters.grammar),
        include_stop=True,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
        terms=check_terms(parameters.priority, parameters.timeout),
        choices=choices,
    )


def check_adapter(adapter: str | None, served: str, info: EngineInfo) -> str:
    """The adapter that is asked for, "" for the model as it is. Raises NoSuchModel for one that is not there."""
    if not adapter or adapter in (served, info.model_id):
        return ""
    if adapter not in info.adapters:
        there = ", ".join(map(repr, info.adapters)) or "none"
        raise NoSuchModel(
            f"`adapter_id` {adapter[:200]!r} does not exist; there are: {there}", param="adapter_id"
        )
    return adapter


def details_wanted(parameters: GenerateParameters) -> bool:
    """Whether the answer has details: who asks for the prompt's asks for the others too."""
    return bool(parameters.details or parameters.decoder_input_details)


def check_inputs(inputs: str, truncate: int | None, info: EngineInfo) -> None:
    """Raises Invalid for an empty prompt or a `truncate` out of range."""
    if not inputs:
        raise Invalid("`inputs` cannot be empty")
    if truncate is not None and not 0 < truncate <= info.max_input_tokens:
        raise Invalid(
            f"`truncate` must be strictly positive and less than {info.max_input_tokens}. Given: {truncate}"
        )


def check_length(prompt_tokens: int, max_new_tokens: int | None, info: EngineInfo) -> int:
    """How many tokens to generate after this prompt. Raises Invalid."""
    room = room_left(prompt_tokens, info)
    wanted = room if max_new_tokens is None else max_new_tokens
    if prompt_tokens > info.max_input_tokens or room < 1:
        raise too_long(info, prompt_tokens)
    if min(wanted, SLICE_TOKENS) > room:
        raise Invalid(
            f"`inputs` tokens + `max_new_tokens` must be <= {info.max_total_tokens}. "
            f"Given: {prompt_tokens} `inputs` tokens and {wanted} `max_new_tokens`"
        )
    return min(wanted, room)


def too_long(info: EngineInfo, prompt_tokens: int, *, at_least: bool = False) -> Invalid:
    """The error for a prompt over the input limit."""
    count = f"at least {prompt_tokens}" if at_least else str(prompt_tokens)
    return Invalid(f"`inputs` must have less than {info.max_input_tokens} tokens. Given: {count}")


def _sampling_asked(parameters: GenerateParameters) -> bool:
    warpers = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
    return bool(parameters.do_sample) or any(value is not None for value in warpers)


def _temperature(parameters: GenerateParameters) -> float:
    """0 (greedy) unless sampling is asked for: by `do_sample`, or by a transform that only sampling has a use for."""
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    transforms = (
        temperature != 1.0
        or parameters.top_k is not None
        or parameters.top_p not in (None, 1.0)
        or parameters.typical_p not in (None, 1.0)
    )
    if not (parameters.do_sample or transforms) or temperature < GREEDY_BELOW:
        return 0.0
    return temperature


def _check_best_of(parameters: GenerateParameters, config: ServerConfig, *, streaming: bool) -> int:
    best_of = 1 if parameters.best_of is None else parameters.best_of
    if best_of == 1:
        return 1
    if config.max_best_of == 1:
        raise Invalid("`best_of` != 1 is not allowed for this endpoint")
    if not 0 < best_of <= config.max_best_of:
        raise Invalid(f"`best_of` must be > 0 and <= {config.max_best_of}. Given: {best_of}")
    if streaming:
        raise Invalid("`best_of` != 1 is not supported when streaming tokens")
    if not _sampling_asked(parameters):
        raise Invalid("you must use sampling when `best_of` is > 1")
    return best_of


def _check_ranges(parameters: GenerateParameters) -> None:
    p = parameters
    checks = (
        (p.temperature, lambda v: v > 0.0 and is_float32(v), "`temperature` must be strictly positive"),
        (
            p.repetition_penalty,
            lambda v: v > 0.0 and is_float32(v),
            "`repetition_penalty` must be strictly positive",
        ),
        (p.frequency_penalty, lambda v: -2.0 <= v <= 2.0, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        (p.top_p, lambda v: 0.0 < v <= 1.0, "`top_p` must be > 0.0 and <= 1.0"),
        (p.typical_p, lambda v: 0.0 < v <= 1.0, "`typical_p` must be > 0.0 and <= 1.0"),
        (p.top_k, lambda v: 0 < v < 2**31, "`top_k` must be strictly positive"),
        (p.max_new_tokens, lambda v: v > 0, "`max_new_tokens` must be strictly positive"),
        (p.seed, lambda v: 0 <= v <= MAX_SEED, f"`seed` must be >= 0 and <= {MAX_SEED}"),
    )
    for value, holds, sentence in checks:
        if value is not None and not holds(value):
            raise Invalid(sentence)


def _check_stops(stop: str | list[str] | None, config: ServerConfig) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > config.max_stop_sequences:
        raise Invalid(
            f"`stop` supports up to {config.max_stop_sequences} stop sequences. Given: {len(stops)}"
        )
    if any(not 0 < len(text) <= config.max_stop_chars for text in stops):
        raise Invalid(f"`stop` sequences must have between 1 and {config.max_stop_chars} characters")
    return stops


def _check_top_n(top_n: int | None, config: ServerConfig) -> int:
    if top_n is not None and not 0 <= top_n <= config.max_top_n_tokens:
        raise Invalid(f"`top_n_tokens` must be >= 0 and <= {config.max_top_n_tokens}. Given: {top_n}")
    return top_n or 0
