"""One running token list on the host: a request, what it generated, and where it stands. Knows no device.

A sequence is WAITING for a lane, or it holds one: in PREFILL until its whole token list is planned, then DECODE. Tokens
are known to the host a turn after they are planned, so a sequence counts those still in flight. One with a grammar has a
guide, and is planned only when nothing of it is in flight and the mask of its next token is there. One whose tokens are
guessed has a drafter; with guesses in flight it is not planned either.
"""

import hashlib
import time
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from .draft import Drafter
from .grammar import Guide
from .local import Sink
from .request import FinishReason, LaneStats, Request, SamplingParams, StepOutput, Timing, TokenOutput


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. Owned by the engine's thread."""

    request: Request
    sink: Sink
    arrival: int
    """Rank of arrival: older sequences are served first and preempted last."""
    most_tokens: int
    """Length at which it must end: prompt and output."""
    adapter: int = 0
    """Its number from 1 up, 0 for none."""
    adapter_digest: str = ""
    """What the adapter's numbers are known by."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and all output known so far."""
    phase: Phase = Phase.WAITING
    lane: int = -1
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are, or by a launch in flight will be, in the pool."""
    recorded: int = 0
    """Tokens that the lane has counted for penalties: all before what is computed again, or anew."""
    in_flight: int = 0
    """Tokens sampled by launches whose result was not read yet."""
    scored: int = 1
    """Tokens of the prompt whose log-probabilities are planned, if they are asked for; the first has none."""
    prompt: list[TokenOutput] = field(default_factory=list)
    """Those read back, until the first output takes them along."""
    guide: Guide | None = None
    """Where it stands in its grammar, if it has one."""
    drafter: Drafter | None = None
    """Who guesses its next tokens, if somebody does."""
    guessed: int = 0
    """Guesses in flight: how many tokens its launch makes is not known before it is read."""
    unsent: list[TokenOutput] = field(default_factory=list)
    """Tokens that the grammar forced before the first was sampled: they are sent with it."""
    keys: list[bytes] = field(default_factory=list)
    """Of its first pages, see `pages.chain`."""
    remembered: int = 0
    """Pages that others may find."""
    cached_tokens: int | None = None
    """Prompt tokens that were found when it was first admitted."""
    submitted_s: float = field(default_factory=time.monotonic)
    launched_s: float | None = None
    first_token_s: float | None = None

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.request.resume_ids]

    def follow(self, guide: Guide) -> None:
        """Keep to a grammar; what it forces at once is computed with the prompt. At least one token is left to sample."""
        self.guide = guide
        forced = guide.forced(self.most_tokens - len(self.tokens) - 1, may_end=False)
        if forced:
            self.tokens += forced
            self.unsent = [TokenOutput(token) for token in forced]
            guide.prepare()

    @property
    def waits(self) -> bool:
        """Nothing may be sampled now: where it stands is not known, or its next token's mask is not there, or never will be."""
        if self.guide is None:
            return self.guessed > 0
        mask = self.guide.mask
        return self.in_flight > 0 or not mask.done() or mask.exception() is not None

    @property
    def hopes(self) -> bool:
        """Tokens in flight, once read, may be worth guesses at those after them."""
        if self.in_flight == 0 or self.drafter is None:
            return False
        return self.guessed > 0 or (self.guide is None and self.drafter.hopes)

    def guesses(self) -> list[int]:
        """What it may say next. None while tokens are in flight."""
        if self.drafter is None or self.in_flight > 0:
            return []
        if self.guide is None:
            return self.drafter.guess()
        return [guess.token for guess in self.guide.guesses]

    @property
    def sampling(self) -> SamplingParams:
        """What the device is told. A mask sees to the least length itself, lest the two leave no token."""
        asked = self.request.sampling
        return asked if self.guide is None or not asked.min_tokens else replace(asked, min_tokens=0)

    @property
    def length(self) -> int:
        """Tokens, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt the client sent."""
        return len(self.request.prompt_ids)

    @property
    def deadline_s(self) -> float | None:
        """On the monotonic clock."""
        after = self.request.deadline_s
        return None if after is None else self.submitted_s + after

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first among those that wait."""
        return self.request.priority, self.arrival

    def take_targets(self, start: int, end: int) -> tuple[int, ...]:
        """Book the log-probabilities of the prompt's tokens that tokens `start` … `end` - 1 predict: see
        `turn.Segment.targets`. Each is booked once: of one that was preempted, what is booked was or will be read."""
        first, stop = max(start + 1, self.scored), min(end + 1, self.prompt_tokens)
        if self.request.prompt_logprobs is None or first >= stop:
            return ()
        self.scored = stop
        return (*[-1] * (first - 1 - start), *self.tokens[first:stop], *[-1] * (end + 1 - stop))

    @property
    def salt(self) -> bytes:
        """Only requests of the same salt share pages; an adapter makes other pages of the same tokens. A digest has no NUL, so no
        salt of a request without one makes an adapter's keys."""
        apart = f"{self.adapter_digest}\0{self.request.cache_salt}"
        return hashlib.blake2b(apart.encode(), digest_size=16).digest()

    @property
    def counts(self) -> bool:
        """Whether penalties look at its tokens, so that its lane must be told of each."""
        s = self.request.sampling
        return s.repetition_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0

    @property
    def reuses(self) -> bool:
        """Whether it may begin with pages that another has filled: penalties and a prompt's own log-probabilities come of
        computing every token."""
        return not self.counts and self.request.prompt_logprobs is None

    def begin(self, found_tokens: int) -> None:
        """Start with so many tokens in the pool already."""
        self.computed = found_tokens
        if self.cached_tokens is None:
            self.cached_tokens = min(found_tokens, self.prompt_tokens)

    def accept(self, made: tuple[TokenOutput, ...], offered: list[int] | None = None) -> StepOutput:
        """Take in the tokens of one launch, with those that its grammar forces after them, and what draft heads guess after
        the launch's own; says whether the sequence ends.

        Raises RequestFailed if the grammar cannot go on.
        """
        self.in_flight -= 1
        now = time.monotonic()
        first = self.first_token_s is None
        if first:
            self.first_token_s = now
        new, self.unsent = self.unsent, []
        reason = None
        for token in made:
            self.tokens.append(token.id)
            new.append(token)
            reason = self._ending()
            if reason is not None:
                break  # the device does not know a grammar's end, and may have gone on
            if self.guide is not None:
                self.guide.follow([token.id])
        if self.drafter is not None:
            if self.guessed:
                self.drafter.judge(len(made) - 1)
            self.drafter.offer(offered or [])
        self.guessed = 0
        if self.guide is not None and reason is None:
            forced = self.guide.forced(self.most_tokens - len(self.tokens))
            self.tokens += forced
            new += [TokenOutput(token_id) for token_id in forced]
            reason = self._ending()
            if reason is None:
                self._prepare(self.guide)
        timing = self.timing(now) if first or reason is not None else None
        prompt, self.prompt = tuple(self.prompt), []
        cached = (self.cached_tokens or 0) if first else 0
        return StepOutput(self.request.id, tuple(new), reason, cached, timing, prompt)

    def _prepare(self, guide: Guide) -> None:
        if self.drafter is None:
            guide.prepare()
        else:
            guide.prepare(self.drafter.most, self.drafter.guess())

    def _ending(self) -> FinishReason | None:
        """Why the sequence ends with its newest token, if it does."""
        ends = self.request.sampling.stop_ids if self.guide is None else self.guide.end_ids
        if self.tokens[-1] in ends:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.most_tokens else None

    def timing(self, now: float) -> Timing:
        """The times so far, as if the sequence ended now."""
        start = self.submitted_s
        return Timing(
            queue_s=(self.launched_s or now) - start,
            first_token_s=(self.first_token_s or now) - start,
            total_s=now - start,
        )

    def lane_stats(self) -> LaneStats:
        """What its lane does. May be read by another thread, a number or two of it a turn apart."""
        return LaneStats(
            lane=self.lane,
            prefill=self.phase is Phase.PREFILL,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens or 0,
            generated_tokens=max(0, len(self.tokens) - self.prompt_tokens),
            computed_tokens=self.computed,
            most_tokens=self.most_tokens,
            pages=len(self.pages),
            age_s=time.monotonic() - self.submitted_s,
        )

    def abort(self) -> StepOutput:
        """The last output of a sequence that is cut short."""
        return StepOutput(self.request.id, (), FinishReason.ABORT, timing=self.timing(time.monotonic()))
