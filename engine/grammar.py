"""Grammars (llguidance's): compiled once, then one `Guide` a sequence, which says what its next token may be.

The submitting thread waits for compiling, which needs a deep stack and so a thread of its own, and computes the first mask;
later masks are computed by a few threads while the device works, so that nobody's step waits for somebody's grammar. Bounds keep a grammar from taking more than
a second or two; one that breaks them is refused here, or fails its own request later. Knows bits and token ids; no text
but the grammars', and no device.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from ..models.errors import ModelError
from .errors import InvalidRequest, RequestFailed
from .grammar_bounds import check_grammar, compilers, grammar_limits
from .request import SamplingParams

KEPT_GRAMMARS = 64
"""Compiled grammars that are remembered, the last used ones."""
COMPILING = 2
"""Grammars compiled at once; other threads wait, and leave cores to the device's host."""
MASK_THREADS = 4
JUMP_TOKENS = 4
"""Forced tokens from which they are appended at once. Their keys and values cost one prefill launch, which is about as
much as a few decode steps; fewer are sampled one by one, where the mask leaves nothing else. The last ones of an output
cost nothing."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all guides of a model share."""

    tokenizer: LLTokenizer
    vocab: int
    """Tokens of the model; the tokenizer may know fewer, or more."""
    inside: np.ndarray
    """int32[ceil(V / 32)]: those of the model, as bits."""
    pool: ThreadPoolExecutor


class Grammars:
    """Compiles the grammars of one model. Any thread may ask."""

    def __init__(self, tokenizer: Callable[[], LLTokenizer], vocab: int) -> None:
        """`tokenizer` is called once, at the first grammar; `vocab` is the model's vocabulary size."""
        self._load = tokenizer
        self._loading = threading.Lock()
        self._loaded: Shared | ModelError | None = None
        self._vocab = vocab
        self._compilers = compilers(COMPILING, "grammars")
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="masks")

    def guide(self, grammar: str, resumed: Sequence[int], sampling: SamplingParams) -> "Guide":
        """A sequence's guide, past the tokens it has generated before; its first mask is there. May take a second.

        Raises InvalidRequest for a grammar that is wrong or too large, in llguidance's words, or a model without one.
        """
        shared = self._shared()
        guide = Guide(self._compiled(grammar, shared.tokenizer).deep_copy(), shared, sampling)
        try:
            guide.follow(resumed)
            guide.mask.set_result(guide.compute())
        except RequestFailed as error:
            raise InvalidRequest(str(error)) from None
        return guide

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def _shared(self) -> Shared:
        with self._loading:
            if self._loaded is None:
                try:
                    inside = bits(range(self._vocab), self._vocab)
                    self._loaded = Shared(self._load(), self._vocab, inside, self._pool)
                except ModelError as error:
                    self._loaded = error
        if isinstance(self._loaded, ModelError):
            raise InvalidRequest(f"this model takes no grammar: {self._loaded}")
        return self._loaded

    def _compiled(self, grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
        found = self._recall(grammar)
        if found is not None:
            return found
        check_grammar(grammar)
        return self._compilers.submit(self._compile, grammar, tokenizer).result()

    def _compile(self, grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
        found = self._recall(grammar)  # another thread may have compiled the same one meanwhile
        if found is not None:
            return found
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=grammar_limits())
        if matcher.is_error():
            raise InvalidRequest(f"the grammar cannot be used: {_why(matcher)}")
        with self._lock:
            self._known[grammar] = matcher
            while len(self._known) > KEPT_GRAMMARS:
                self._known.popitem(last=False)
        return matcher

    def _recall(self, grammar: str) -> LLMatcher | None:
        with self._lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
            return self._known.get(grammar)


class Guess(NamedTuple):
    """A token that may come next."""

    token: int
    mask: np.ndarray
    """Of what may follow it, see `Guide.mask`."""


class Guide:
    """One sequence's way through its grammar. Used by one thread at a time: whoever holds the sequence, or, until
    `mask` is done, the thread that computes it."""

    def __init__(self, matcher: LLMatcher, shared: Shared, sampling: SamplingParams) -> None:
        ends, self._shared, self._matcher = shared.tokenizer.eos_tokens, shared, matcher
        self._min_tokens = sampling.min_tokens
        self._ignores_end = not sampling.stop_ids
        # Each token of a request that wants log-probabilities needs its own forward pass.
        self._jumps = not sampling.logprobs
        self._taken = 0
        """Tokens generated so far."""
        self.end_ids = frozenset(ends) | frozenset(sampling.stop_ids)
        """Tokens that end the output: those of the grammar's own end, and the request's."""
        self._end_id = next((token for token in sampling.stop_ids if token in ends), ends[0])
        self._ends = bits((token for token in self.end_ids if token < shared.vocab), shared.vocab)
        self.mask: Future[np.ndarray] = Future()
        """int32[ceil(V / 32)]: the tokens that may be next, as bits, V those of the model. Fails with RequestFailed."""
        self.guesses: list[Guess] = []
        """What may come, one after another, if somebody asked for guesses; there when the mask is."""

    def follow(self, tokens: Iterable[int]) -> None:
        """Go on with these tokens. Raises RequestFailed if the grammar does not allow them."""
        for token in tokens:
            if not self._matcher.consume_token(token):
                raise self._failed(f"token {token} does not follow the grammar")
            self._taken += 1

    def forced(self, most: int, *, may_end: bool = True) -> list[int]:
        """The tokens that must be next, at most so many, if that is worth a jump; the guide goes on with them.

        With `may_end` they may include the one that ends the output: as the last of them, where the grammar allows no
        other.
        """
        if not self._jumps or most <= 0:
            return []
        trial, tokens = self._matcher.deep_copy(), self._matcher.compute_ff_tokens()[:most]
        tokens = tokens[
            : next((i for i, token in enumerate(tokens) if not self._appends(token)), len(tokens))
        ]
        if not trial.consume_tokens(tokens):
            return []
        full = len(tokens) == most
        ended = may_end and trial.is_stopped() and not full
        if len(tokens) < JUMP_TOKENS and not ended and not (may_end and full):
            return []
        self._matcher = trial
        self._taken += len(tokens)
        return [*tokens, self._end_id] if ended else tokens

    def _appends(self, token: int) -> bool:
        """May it be appended unseen? What ends the output is sampled, or appended last."""
        return token < self._shared.vocab and token not in self.end_ids

    def prepare(self, most_guesses: int = 0, others: Sequence[int] = ()) -> None:
        """Begin to compute the mask of the next token and, for at most so many guesses, of the tokens after it. Guesses are
        what the grammar leaves no choice about, and `others` as far as it allows them."""
        self.guesses = []
        self.mask = self._shared.pool.submit(self.compute, most_guesses, others)

    def compute(self, most_guesses: int = 0, others: Sequence[int] = ()) -> np.ndarray:
        """The mask of the next token, after what `prepare` says. Raises RequestFailed if there is none."""
        mask = self._compute(self._matcher, self._taken)
        if most_guesses:
            self.guesses = self._guess(mask, most_guesses, others)
        return mask

    def _guess(self, mask: np.ndarray, most: int, others: Sequence[int]) -> list[Guess]:
        matcher, guesses, taken = self._matcher.deep_copy(), [], self._taken
        forced: list[int] = []
        while len(guesses) < most:
            forced = forced or matcher.compute_ff_tokens()
            at = len(guesses)
            token = forced.pop(0) if forced else others[at] if at < len(others) else -1
            if not forced and at < len(others) and token != others[at]:
                others = ()  # it went another way
            if not (0 <= token < self._shared.vocab and mask[token // 32] >> token % 32 & 1):
                break
            if token in self.end_ids or not matcher.consume_token(token):
                break
            taken += 1
            try:
                mask = self._compute(matcher, taken)
            except RequestFailed:
                break
            guesses.append(Guess(token, mask))
        return guesses

    def _compute(self, matcher: LLMatcher, taken: int) -> np.ndarray:
        """int32[ceil(V / 32)] of the token after `taken` generated ones."""
        words = np.zeros((1, (self._shared.tokenizer.vocab_size + 31) // 32), np.int32)
        fill_next_token_bitmask(matcher, words)
        if matcher.is_error():
            raise RequestFailed(f"the grammar cannot go on: {_why(matcher)}")
        mask = words[0, : self._shared.inside.size] & self._shared.inside
        if self._ignores_end or taken < self._min_tokens:
            # Where nothing else may follow, the grammar's end stays the output's.
            going_on = mask & ~self._ends
            mask = going_on if going_on.any() else mask
        if not mask.any():
            raise RequestFailed("the grammar cannot go on: no token of this model fits")
        return mask

    def _failed(self, what: str) -> RequestFailed:
        return RequestFailed(f"{what}: {_why(self._matcher)}")


def _why(matcher: LLMatcher) -> str:
    """llguidance's words, without its mark that they are short."""
    return matcher.get_error().partition("\n<non-verbose/>")[0]


def bits(ids: Iterable[int], vocab: int) -> np.ndarray:
    """Token ids -> int32[ceil(vocab / 32)], the lowest bit first, as llguidance writes masks."""
    flags = np.zeros(-(-vocab // 32) * 32, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
