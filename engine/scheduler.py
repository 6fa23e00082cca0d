"""Policy: who waits, who gets a lane, which chunk of which prompt comes next, who must give way. Host Python only.

First come, first served within a priority, in turns between owners (`waiting`). A sequence is admitted when a lane and the
pages of its whole token list are free, with a page to spare for each running sequence to grow into; sequences of lesser
priority give way to it if that makes the room. When a running sequence needs a page and none is left, the last by priority and arrival
gives its pages back and is computed again later (preemption by recompute), so the first always advances.
A sequence with a grammar samples only when its mask is there; where its grammar forced tokens, they are one more piece of
prompt. Where decoding lanes leave rows of a launch free, guesses at what a sequence says next are verified in them.
A sequence that begins like an earlier one shares the pages of what they share, and computes the rest alone.
Knows no device and no time: the loop calls `plan` once a turn and `absorb` for every result read back.
"""

import heapq
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .errors import RequestFailed
from .pages import PageAllocator, chain, pages_for
from .request import LaneStats, StepOutput
from .sequence import Phase, Sequence
from .turn import NO_PAGE, Result, Row, Segment, Turn, sharing
from .waiting import OUTPUT_TOKEN, PROMPT_TOKEN, Waiting


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes the scheduler plans within."""

    lanes: int
    page_tokens: int
    chunk_tokens: int
    """Most prompt tokens of a turn."""
    chunk_segments: int
    """Sequences per prefill launch, at most."""
    decode_rows: int = 0
    """Rows per decode launch. What decoding lanes leave of them, guesses may have."""
    segment_tokens: int = 1
    """Of a budget, for each sequence that shares it; see `turn.SEGMENT_TOKENS`."""


class Scheduler:
    """The state of all sequences, and the plan of each turn."""

    def __init__(
        self, limits: Limits, pages: PageAllocator, budget: Callable[[int, int, int], int] | None = None
    ) -> None:
        """`budget` says how many prompt tokens may be computed beside so many lanes that decode, where so many prompts could be
        and the farthest is at such a position; None: as many as ever."""
        self.limits = limits
        self._budget = budget or (lambda rows, prompts, behind: limits.chunk_tokens)
        self.pages = pages
        self.preemptions = 0
        self.guessed = 0
        """Tokens guessed since start."""
        self._waiting = Waiting()
        self._running: list[Sequence] = []
        """In their order: by priority, then by arrival."""
        self._lanes = list(range(limits.lanes))

    @property
    def waiting(self) -> int:
        """Sequences without a lane."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with a lane."""
        return len(self._running)

    def taken_lanes(self) -> tuple[LaneStats, ...]:
        """What the taken lanes do, by number. May be asked from another thread."""
        told = [sequence.lane_stats() for sequence in [*self._running]]
        return tuple(sorted((lane for lane in told if lane.lane >= 0), key=lambda lane: lane.lane))

    def sequences(self) -> list[Sequence]:
        """All that are not finished, running first."""
        return [*self._running, *self._waiting]

    def guided(self) -> list[Sequence]:
        """Those with a lane that follow a grammar."""
        return [sequence for sequence in self._running if sequence.guide is not None]

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, or one that was preempted."""
        sequence.phase = Phase.WAITING
        if not self._running and not self._waiting:
            self._waiting.forget()
        self._waiting.add(sequence)

    def plan(self) -> Turn:
        """Decide the next turn and book its lanes and pages."""
        turn = Turn()
        self._grow()
        decoding = [
            s for s in self._running if s.phase is Phase.DECODE and s.length < s.most_tokens and not s.waits
        ]
        if self._waiting or len(decoding) < len(self._running):
            self._prefill(turn, self._budget(len(decoding), *self._asking()))
        room = 0 if turn.segments else self.limits.decode_rows - len(decoding)
        for sequence in decoding:
            # It may have given way to one that was admitted, and been admitted again behind that.
            if sequence.phase is Phase.DECODE and sequence not in turn.prefilled:
                guesses = self._guesses(sequence, room)
                room -= len(guesses)
                self._decode(turn, sequence, guesses)
        return turn

    def _asking(self) -> tuple[int, int]:
        """Prompts that could be computed, and how far the farthest of them is. If a launch could compute all of one it counts twice:
        that is one pause, not many, and in small pieces it would take three times the work."""
        begun = [s for s in self._running if s.phase is Phase.PREFILL]
        waiting = min(len(self._waiting), len(self._lanes))
        first = [self._waiting.first()] if waiting else []
        short = any(
            s is not None and len(s.tokens) - (s.cached_tokens or 0) <= self.limits.chunk_tokens
            for s in begun + first
        )
        return len(begun) + waiting + short, max((s.computed for s in begun), default=0)

    @property
    def hopes(self) -> bool:
        """Whether it pays to read what is in flight before the next turn is planned: somebody may guess then, or has."""
        if not self.limits.decode_rows:
            return False
        decoding = [sequence for sequence in self._running if sequence.phase is Phase.DECODE]
        return len(decoding) < self.limits.decode_rows and any(sequence.hopes for sequence in decoding)

    def absorb(self, sequence: Sequence, made: Result, offered: list[int] | None = None) -> StepOutput | None:
        """Take in one result, and what draft heads guess to follow it; None for a lane that had ended on the device. Frees
        the sequence if it ends.

        Raises RuntimeError if the device ended a lane that goes on here: it would wait for its next token for ever.
        RequestFailed if that is the result, or the sequence's grammar cannot go on.
        """
        if sequence.phase is Phase.FINISHED:
            return None
        if made is None:
            raise RuntimeError(f"request {sequence.request.id} ended on the device but not on the host")
        if isinstance(made, RequestFailed):
            self.pages.disown(sequence.pages)  # what made no sense here shall begin nobody else's
            raise made
        if sequence.phase is Phase.DECODE:
            sequence.computed += len(made) - 1
        self.guessed += sequence.guessed
        output = sequence.accept(made, offered)
        self._waiting.charge(sequence, OUTPUT_TOKEN * len(output.tokens))
        self._remember(sequence)
        if output.finish_reason is not None:
            self.drop(sequence)
        elif sequence.phase is Phase.DECODE and sequence.guide is not None:
            self._jump(sequence)
        return output

    def _jump(self, sequence: Sequence) -> None:
        """Compute tokens that were forced, not sampled, as a piece of prompt. The lane knows all before them, and the
        newest of those is not in the pool yet."""
        if sequence.computed < len(sequence.tokens) - 1:
            sequence.phase = Phase.PREFILL
            sequence.recorded = sequence.computed + 1

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands; its lane and pages are free at once.

        Launches in flight may still write to its pages; whoever gets those is launched later, so the order of launches
        keeps it harmless.
        """
        if sequence.phase is Phase.WAITING:
            self._waiting.drop(sequence)
        elif sequence.phase is not Phase.FINISHED:
            self._release(sequence)
        sequence.phase = Phase.FINISHED

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        heapq.heappush(self._lanes, sequence.lane)
        self.pages.give_back(sequence.pages)
        sequence.lane, sequence.pages = -1, []
        sequence.computed = sequence.recorded = sequence.remembered = 0

    def _grow(self) -> None:
        """Make sure each running sequence has the pages of its tokens; the oldest are served first."""
        width = self.limits.page_tokens
        for sequence in [*self._running]:
            length = len(sequence.tokens) + sequence.in_flight
            if length <= len(sequence.pages) * width or length >= sequence.most_tokens:
                continue
            while sequence.phase is not Phase.WAITING and self._missing(sequence) > 0:
                page = self.pages.take(1)
                if page is not None:
                    sequence.pages += page
                else:
                    self._preempt(max(self._running, key=lambda s: s.order))

    def _missing(self, sequence: Sequence, guesses: int = 0) -> int:
        return pages_for(sequence.length + guesses, self.limits.page_tokens) - len(sequence.pages)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._release(sequence)
        self.add(sequence)

    def _prefill(self, turn: Turn, budget: int) -> None:
        """Plan pieces of prompts of `budget` tokens in all."""
        most = sharing(budget, self.limits.chunk_segments, self.limits.segment_tokens)
        for sequence in self._prompts():
            budget -= self._chunk(turn, sequence, budget)
            if budget == 0 or len(turn.segments) == most:
                return

    def _prompts(self) -> Iterator[Sequence]:
        """Those with prompt left to compute, in the order of those that wait: they have a lane, or are given one when their
        turn comes."""
        admits, rank = True, self._waiting.rank
        for sequence in sorted((s for s in self._running if s.phase is Phase.PREFILL), key=rank):
            while admits and (first := self._waiting.first()) is not None and rank(first) < rank(sequence):
                admitted = self._admit()
                admits = admitted is not None
                if admitted is not None:
                    yield admitted
            if sequence.phase is Phase.PREFILL:  # it may have given way to one of them
                yield sequence
        while admits and (admitted := self._admit()) is not None:
            yield admitted

    def _admit(self) -> Sequence | None:
        """Give the first of the waiting a lane, if there is room. Nobody overtakes: a long request is not starved."""
        sequence = self._waiting.first()
        if sequence is None or sequence.in_flight > 0:
            return None  # preempted this moment; its last tokens are still to be read
        if not self._make_room(sequence):
            return None
        self._waiting.take(sequence)
        found = self._known(sequence)
        self.pages.share(found)
        sequence.pages = [*found, *(self.pages.take(self._needed(sequence, found)) or [])]
        first = sequence.cached_tokens is None
        sequence.begin(len(found) * self.limits.page_tokens)
        if first:  # what is computed again is not its owner's doing
            self._waiting.charge(sequence, PROMPT_TOKEN * (len(sequence.tokens) - sequence.computed))
        sequence.lane = heapq.heappop(self._lanes)
        sequence.phase = Phase.PREFILL
        # Not appended and sorted: a list is empty while it is sorted, and other threads look at this one.
        insort(self._running, sequence, key=lambda s: s.order)
        return sequence

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether a lane and pages are there for one that waits; for that those of lesser priority give way, last first,
        unless even all of them would not be enough."""
        yielding = [s for s in self._running if s.request.priority > sequence.request.priority]
        staying = len(self._running) - len(yielding)
        while not self._lanes or self._short(sequence, len(self._running)) > 0:
            short, most = self._short(sequence, staying), sum(len(s.pages) for s in yielding)
            # `most` counts what they share many times, but costs nothing.
            if not yielding or short > most or short > self._gain(sequence, yielding):
                return False
            self._preempt(yielding.pop())
        return True

    def _short(self, sequence: Sequence, beside: int) -> int:
        """Pages that are missing to admit it beside so many running ones, which grow."""
        found = self._known(sequence)
        reserve = beside + 1 if beside else 0
        return self._needed(sequence, found) + reserve - (self.pages.free - self.pages.idle(found))

    def _gain(self, sequence: Sequence, yielding: list[Sequence]) -> int:
        """Pages that it could take if all of these gave way: none that others hold too, or that it will share itself."""
        return len(self.pages.held_by(s.pages for s in yielding).difference(self._known(sequence)))

    def _needed(self, sequence: Sequence, found: list[int]) -> int:
        return pages_for(len(sequence.tokens), self.limits.page_tokens) - len(found)

    def _known(self, sequence: Sequence) -> list[int]:
        """Pages that hold its beginning already. Its last token is always computed: the next one comes of it."""
        if not sequence.reuses:
            return []
        width = self.limits.page_tokens
        chain(sequence.tokens, width, sequence.keys, sequence.salt)
        return self.pages.find(sequence.keys[: (len(sequence.tokens) - 1) // width])

    def _remember(self, sequence: Sequence) -> None:
        """Let others find the pages that it has filled. Launches run in order, so what is launched counts as written."""
        width = self.limits.page_tokens
        full = min(sequence.computed, len(sequence.tokens)) // width
        if full <= sequence.remembered or not sequence.pages:
            return
        chain(sequence.tokens, width, sequence.keys, sequence.salt)
        for index in range(sequence.remembered, full):
            self.pages.remember(sequence.pages[index], sequence.keys[index])
        sequence.remembered = full

    def _chunk(self, turn: Turn, sequence: Sequence, budget: int) -> int:
        """Plan the next piece of a prompt; returns its length in tokens, 0 if the mask it ends with is not there."""
        start = sequence.computed
        tokens = sequence.tokens[start : start + budget]
        last = start + len(tokens) == len(sequence.tokens)
        if last and sequence.waits:
            return 0
        turn.segments.append(
            Segment(
                lane=sequence.lane,
                tokens=tokens,
                start=start,
                last=last,
                prompt_tokens=sequence.prompt_tokens,
                remaining=sequence.most_tokens - len(sequence.tokens),
                pages=sequence.pages,
                sampling=sequence.sampling,
                recorded=sequence.recorded,
                targets=sequence.take_targets(start, start + len(tokens)),
                prompt_top=sequence.request.prompt_logprobs or 0,
                adapter=sequence.adapter,
            )
        )
        turn.prefilled.append(sequence)
        sequence.computed += len(tokens)
        self._remember(sequence)
        if last:
            sequence.phase = Phase.DECODE
            sequence.in_flight += 1
        return len(tokens)

    def _guesses(self, sequence: Sequence, room: int) -> list[int]:
        """What to verify beside its next token, in at most so many rows. Takes the pages for it, but none that a running
        sequence may need to grow."""
        if sequence.drafter is None:
            return []
        guesses = sequence.guesses()[: max(0, min(room, sequence.most_tokens - sequence.length - 1))]
        spare = self.pages.free - len(self._running)
        more = min(self._missing(sequence, len(guesses)), spare)
        if more > 0:
            sequence.pages += self.pages.take(more) or []
        return guesses[: len(sequence.pages) * self.limits.page_tokens - sequence.length]

    def _decode(self, turn: Turn, sequence: Sequence, guesses: list[int]) -> None:
        width = self.limits.page_tokens
        at = sequence.length - 1
        for ahead, guess in enumerate((0, *guesses)):
            page_index, slot = divmod(at + ahead, width)
            page = sequence.pages[page_index] if slot == 0 else NO_PAGE
            turn.rows.append(Row(sequence.lane, page_index, page, ahead, guess))
            turn.decoded.append(sequence)
        sequence.computed += 1
        sequence.in_flight += 1
        sequence.guessed = len(guesses)
