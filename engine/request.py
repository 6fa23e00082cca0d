"""What the engine is asked and what it answers: plain values that cross the client seam. No text, no arrays.

`Request` goes in, a stream of `StepOutput` comes out; the last one carries a `finish_reason`.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from .errors import InvalidRequest

MAX_LOGIT_BIAS = 300
"""Most biased tokens of a request (the width of a lane's table)."""
MAX_TOP_LOGPROBS = 20
"""Most alternatives a step can report per token (the width of its packed result)."""
MAX_PROMPT_LOGPROBS = 1_000_000
"""Most log-probabilities of one prompt, alternatives included: they travel in one message."""

DURATION_EDGES_S = tuple(1.5e-4 * 1.5**k for k in range(35))
"""Of histograms of durations: TGI's, 0.15 ms to 146 s."""
ROWS_EDGES = tuple(float(2**k) for k in range(11))
"""Of histograms of sequences."""
MAX_SPECULATE = 16
"""Most tokens guessed at a time."""
ACCEPTED_EDGES = tuple(float(n) for n in range(MAX_SPECULATE))
"""Of histograms of right guesses: each number has a bucket of its own."""


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """A stop token (end of sequence) was sampled; it is the last token of the output."""
    LENGTH = "length"
    """The token budget is used up."""
    ABORT = "abort"
    """Cancelled by the client, or the engine is stopping."""


class LogprobsMode(StrEnum):
    """Which distribution reported log-probabilities come from."""

    RAW = "raw"
    """The model's own, before penalties and temperature (OpenAI)."""
    PROCESSED = "processed"
    """The one sampled from, after every transform (TGI)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence picks its tokens. Neutral values switch a transform off; `temperature` 0 is greedy."""

    max_tokens: int
    """Most tokens to generate, at least 1."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the largest logit."""
    top_k: int = 0
    """Keep the k largest; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set whose mass reaches p, in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest, in [0, 1]."""
    typical_p: float = 1.0
    """Keep the most typical tokens until their mass reaches p, in (0, 1] (Meister et al. 2022)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Subtracted once per earlier occurrence in the output (OpenAI's definition)."""
    presence_penalty: float = 0.0
    """Subtracted once if the token occurs in the output (OpenAI's definition)."""
    seed: int = 0
    """64-bit unsigned; with the position it alone decides the randomness of a token."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the sequence; empty means `ignore_eos`."""
    logprobs: bool = False
    """Report the log-probability of each chosen token."""
    top_logprobs: int = 0
    """Report this many alternatives a token, 0 … MAX_TOP_LOGPROBS; needs `logprobs`."""
    logprobs_mode: LogprobsMode = LogprobsMode.RAW
    min_tokens: int = 0
    """Tokens to generate before a stop id may be chosen, at most `max_tokens`; resumed ones count."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), at most MAX_LOGIT_BIAS of them, no id twice (OpenAI)."""
    watermark: bool = False
    """Favour a green list that the token before decides (Kirchenbauer et al. 2023)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate."""

    id: str
    """Unique among the requests now in the engine."""
    prompt_ids: tuple[int, ...]
    """The prompt, at least one token."""
    sampling: SamplingParams
    resume_ids: tuple[int, ...] = ()
    """Tokens already generated for this request by an engine that was lost. They are computed again but not sent
    again, count against `max_tokens`, and randomness goes on as if nothing had happened."""
    priority: int = 0
    """Lower runs first, and takes the lane and the pages of the youngest of those whose number is higher."""
    deadline_s: float | None = None
    """Seconds from submission after which the request fails with DeadlineExceeded; None waits for ever."""
    grammar: str | None = None
    """What the output must match, as llguidance writes it (`LLMatcher.grammar_from_json_schema` and its like); None leaves
    it free."""
    cache_salt: str = ""
    """Only requests of the same salt share what the prefix cache holds."""
    owner: str = ""
    """For whom: requests of one priority that wait are served in turns between their owners, by tokens."""
    weight: int = 1
    """How many times the tokens of an owner of weight 1 this one gets while both wait, at least 1."""
    adapter: str = ""
    """Name of the adapter to compute with, one of `EngineInfo.adapters`; empty for the model as it is."""
    prompt_logprobs: int | None = None
    """Report the prompt's own log-probabilities with this many alternatives a token, 0 … MAX_TOP_LOGPROBS; None does not."""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token."""

    id: int
    logprob: float | None = None
    """Natural log, float32; None unless asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the likeliest tokens, best first."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened to a request, in seconds since it was submitted to the engine."""

    queue_s: float
    """Until its first prefill chunk was launched."""
    first_token_s: float
    """Until its first token was read back."""
    total_s: float
    """Until its last token was read back."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one request got from one turn of the engine, or from several that its reader had not read."""

    request_id: str
    tokens: tuple[TokenOutput, ...]
    """New tokens in order; may be empty only in the last output."""
    finish_reason: FinishReason | None = None
    """Set on the last output only."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the cache; meaningful on the first output."""
    timing: Timing | None = None
    """Set on the first output, with the times so far, and on the last."""
    prompt: tuple[TokenOutput, ...] = ()
    """With `prompt_logprobs`, on the first output: the prompt's tokens but the first, which nothing comes before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInfo:
    """One compiled program."""

    name: str
    compile_s: float
    argument_bytes: int
    alias_bytes: int
    temp_bytes: int
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine serves and with which limits; constant after it is ready."""

    model_id: str
    model_sha: str | None
    dtype: str
    platform: str
    """`cpu`, `gpu` or `tpu`."""
    device_kind: str
    device_count: int
    vocab_size: int
    max_total_tokens: int
    """Most tokens, prompt and output together, of one request."""
    max_input_tokens: int
    lanes: int
    pages: int
    page_tokens: int
    max_queued: int
    kernels: str
    """Which attention and matmul implementation was chosen, and why."""
    warning: str = ""
    """What whoever chose these options should know of them."""
    memory_bytes: int = 0
    """What the engine may use, over all devices."""
    quantize: str = ""
    """How weights are stored, if in fewer bits than `dtype` has."""
    kv_dtype: str = ""
    """Of keys and values, if not `dtype`."""
    parameters: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    temp_bytes: int = 0
    """The largest program's temporaries."""
    speculate: int = 0
    """Most tokens guessed at a time for a sequence."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters a request may ask for."""
    programs: tuple[ProgramInfo, ...] = field(default=())
    version: str = ""

    @property
    def precision(self) -> str:
        """For people: what is computed in, and how weights are stored if otherwise."""
        others = (("weights", self.quantize), ("KV", self.kv_dtype))
        return ", ".join([self.dtype, *(f"{name} {kind}" for name, kind in others if kind)])


@dataclass(frozen=True, slots=True)
class Histogram:
    """How a quantity was spread since start."""

    counts: tuple[int, ...]
    """Values up to each edge and above the one before it; one more for those above the last."""
    sum: float
    """Of all values."""


@dataclass(frozen=True, slots=True)
class LaunchStats:
    """What launches of one kind took, between DURATION_EDGES_S. One that computes prompts beside lanes that decode is of the
    prompts' kind."""

    whole_s: Histogram
    """From launch, or the end of the one before, to the delivery of its outputs."""
    device_s: Histogram
    """From launch, or the read-back of the one before, to its read-back."""
    emit_s: Histogram
    """From its read-back to the delivery of its outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStats:
    """What one lane that is taken does now."""

    lane: int
    prefill: bool
    """Whether the sequence's tokens are still being computed; else it decodes."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the cache."""
    generated_tokens: int
    computed_tokens: int
    """Of prompt and output, those whose keys and values are in the pool or, by a launch in flight, will be."""
    most_tokens: int
    """Prompt and output at which it must end."""
    pages: int
    age_s: float
    """Since it was submitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine, cheap to take."""

    lanes_active: int
    queued: int
    pages_free: int
    """Pages that no request holds, the remembered ones included."""
    pages_remembered: int
    """Pages that a prompt which begins alike can share."""
    pages_total: int
    steps: int
    """Decode launches since start."""
    prefill_tokens: int
    decode_tokens: int
    preemptions: int
    compiles_after_ready: int
    step_ms: float
    """Median device time of the last decode steps, with read-back."""
    queue_wait_s: float
    """How long a request that came now would wait for a lane, by the time the last ones held theirs."""
    host_ms: float
    """Median work of the host per turn (plan, pack, dispatch, emit). It runs beside the device."""
    gap_ms: float
    """Mean time that the device had nothing to do between two of the last launches, while there was work."""
    prefill: LaunchStats
    decode: LaunchStats
    prefill_rows: Histogram
    """Sequences in a prefill launch, between ROWS_EDGES."""
    joins: int
    """Turns in which sequences began beside running ones."""
    guessed_tokens: int
    """Tokens guessed and verified since start."""
    accepted: Histogram
    """How many of them were right, for each sequence in each launch that made it a token, between ACCEPTED_EDGES."""
    taken_lanes: tuple[LaneStats, ...] = ()
    """What each does, by number."""


def check_prompt_scores(prompt_tokens: int, alternatives: int) -> None:
    """Raises InvalidRequest if a prompt of this length has too many log-probabilities, each with so many alternatives."""
    scores = prompt_tokens * (1 + alternatives)
    if scores > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"log-probabilities of {prompt_tokens} prompt tokens, each with {alternatives} alternatives, are "
            f"{scores} and can be at most {MAX_PROMPT_LOGPROBS}"
        )
