"""Checked parameters → engine requests: what both APIs share. Here and in validate_*.py is every limit of this room.

A body that got through `validate_tgi` or `validate_openai` is a `Checked`; with its tokenised prompt it becomes one
engine `Request` per sequence. Knows no JSON and no HTTP.
"""

import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine import EngineInfo, InvalidRequest, Request, SamplingParams, check_prompt_scores
from .config import ServerConfig
from .errors import Invalid
from .forms import Form
from .keys import own_salt, own_share

MAX_SEED = 2**64 - 1
MAX_PRIORITY = 2**31 - 1
"""Either way from 0."""
MAX_SALT_CHARS = 512
GREEDY_BELOW = 1e-5
"""A temperature this small divides logits into infinities; it means the largest logit, so that is what it gets."""
_FLOAT32_MAX = 3.4028234e38


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On which terms a request is served, whatever it asks for."""

    priority: int = 0
    """Lower runs first."""
    timeout_s: float | None = None
    """From submission to its last token; None waits for ever."""
    cache_salt: str = ""
    """Only requests of the same salt share what the prefix cache holds."""
    adapter: str = ""
    """To be computed with; empty for the model as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Parameters that passed every check that needs no prompt."""

    sampling: SamplingParams
    """Everything but `max_tokens` (set per prompt) and the seed of the second and later choices."""
    max_tokens: int | None
    """Tokens asked for; None means as many as fit."""
    stops: tuple[str, ...] = ()
    include_stop: bool
    """Whether the answer keeps the stop string that ended it, as TGI's does and OpenAI's does not."""
    form: Form | None = None
    """What the answer has to match."""
    grammar: str | None = None
    """The same and all else that has to be kept, for the engine."""
    prompt_logprobs: int | None = None
    """Alternatives to report for each token of the prompt; None scores no prompt."""
    terms: Terms = Terms()
    choices: int = 1
    """Sequences to run per prompt."""
    keep: int = 1
    """Best of them to return."""

    @property
    def sampled(self) -> bool:
        """Whether chance plays a part, so that the seed is worth telling."""
        return self.sampling.temperature > 0.0


def is_float32(value: float) -> bool:
    """Whether the engine can hold this number."""
    return math.isfinite(value) and abs(value) <= _FLOAT32_MAX


def random_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(64)


def derive_seed(seed: int, choice: int) -> int:
    """The seed of one of several sequences of a request; the first keeps the request's own.

    A step and finaliser of splitmix64 (Steele et al. 2014), so neighbouring choices share nothing.
    """
    if choice == 0:
        return seed
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & MAX_SEED
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return mixed ^ (mixed >> 31)


def surely_longer(text: str, tokens: int, config: ServerConfig) -> bool:
    """Whether a text has more tokens than this, told from its length alone, before any work is spent on it."""
    limit = tokens * config.max_token_bytes
    return len(text) > limit or (4 * len(text) > limit and len(text.encode()) > limit)


def check_prompt_logprobs(name: str, config: ServerConfig) -> None:
    """Raises Invalid if this server computes no log-probabilities of prompts, which `name` asks for."""
    if not config.prompt_logprobs:
        raise Invalid(
            f"`{name}` is switched off on this server (--enable-prefill-logprobs=false)", param=name
        )


def check_terms(priority: int | None, timeout_s: float | None, cache_salt: str | None = None) -> Terms:
    """The terms under which a request comes, by the names `priority`, `timeout` and `cache_salt`. Raises Invalid."""
    if priority is not None and not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise Invalid(
            f"`priority` must be between {-MAX_PRIORITY} and {MAX_PRIORITY}. Given: {priority}",
            param="priority",
        )
    if timeout_s is not None and not 0.0 < timeout_s < math.inf:
        raise Invalid(f"`timeout` must be a number of seconds above 0. Given: {timeout_s}", param="timeout")
    salt = cache_salt or ""
    if len(salt) > MAX_SALT_CHARS:
        raise Invalid(f"`cache_salt` takes at most {MAX_SALT_CHARS} characters", param="cache_salt")
    return Terms(priority=priority or 0, timeout_s=timeout_s, cache_salt=salt)


def with_adapter(checked: Checked, adapter: str) -> Checked:
    """The same, to be computed with an adapter (its name; empty for none)."""
    return replace(checked, terms=replace(checked.terms, adapter=adapter)) if adapter else checked


def room_left(prompt_tokens: int, info: EngineInfo) -> int:
    """Most tokens that can be generated after a prompt."""
    return info.max_total_tokens - prompt_tokens


def requests_of(checked: Checked, prompt_ids: Sequence[int], max_tokens: int) -> list[Request]:
    """One engine request per sequence of a prompt. Raises Invalid if it cannot get as long as it has to, or its
    prompt has too many log-probabilities."""
    if checked.sampling.min_tokens > max_tokens:
        raise Invalid(
            f"`min_tokens` must be at most the {max_tokens} tokens that can be generated. "
            f"Given: {checked.sampling.min_tokens}",
            param="min_tokens",
        )
    ids = tuple(prompt_ids)
    if checked.prompt_logprobs is not None:
        try:
            check_prompt_scores(len(ids), checked.prompt_logprobs)
        except InvalidRequest as error:
            raise Invalid(str(error), param="prompt_logprobs") from None
    base = replace(checked.sampling, max_tokens=max_tokens)
    owner, weight = own_share()
    return [
        Request(
            # Ours, never the client's: two clients that send the same id must not meet.
            id=os.urandom(16).hex(),
            prompt_ids=ids,
            sampling=base if choice == 0 else replace(base, seed=derive_seed(base.seed, choice)),
            grammar=checked.grammar,
            priority=checked.terms.priority,
            deadline_s=checked.terms.timeout_s,
            cache_salt=checked.terms.cache_salt or own_salt(),
            owner=owner,
            weight=weight,
            adapter=checked.terms.adapter,
            prompt_logprobs=checked.prompt_logprobs,
        )
        for choice in range(checked.choices)
    ]
