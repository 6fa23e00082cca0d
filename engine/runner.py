"""Launches turns: packs the plan, tells the other processes if there are any, has the program launched, reads back.

Launching returns at once; `Launch.read` waits. Knows arrays and programs; why a lane runs is the scheduler's business.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter

import jax
import numpy as np

from .batch import RESULT_WIDTH, pack_plan, read_result, read_scores
from .draft import NO_GUESS
from .errors import RequestFailed
from .launcher import Launcher, Made
from .request import TokenOutput
from .sampler import mask_width
from .sequence import Sequence
from .step import Blueprint
from .turn import Result, Segment, Size, Turn

Publish = Callable[[Size, np.ndarray, np.ndarray | None], None]
"""Told of every launch, before it is made."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One program under way."""

    result: jax.Array
    size: Size
    sequences: list[Sequence | None]
    """The sequence of each result row, several rows of one behind each other; None where the row samples nothing (a chunk that does not end its prompt)."""
    rows: int
    """Rows that decode in it."""
    prompt_tokens: int
    """Prompt tokens it computes."""
    behind: int
    """See `Turn`."""
    scores: jax.Array | None = None
    """Of all its prompt tokens, see `prompt_scores`; fetched only if somebody asks."""
    scored: tuple[tuple[Sequence, Segment, int], ...] = ()
    """Who asks: sequence, segment, and where its tokens begin among those of the launch."""

    def read(self) -> list[tuple[Sequence, Result, list[int]]]:
        """Wait for the device; then what each sequence got, and what draft heads guess to follow."""
        rows = zip(self.sequences, np.asarray(self.result))
        by_sequence = itertools.groupby(rows, itemgetter(0))
        return [
            (sequence, *_read(sequence, [row for _, row in group]))
            for sequence, group in by_sequence
            if sequence is not None
        ]

    def read_prompts(self) -> list[tuple[Sequence, list[TokenOutput]]]:
        """After `read`: the log-probabilities of prompts that were asked for."""
        if not self.scored:
            return []
        rows = np.asarray(self.scores)
        return [
            (sequence, read_scores(rows[at : at + len(segment.tokens)], segment.targets, segment.prompt_top))
            for sequence, segment, at in self.scored
        ]


def _read(sequence: Sequence, rows: list[np.ndarray]) -> tuple[Result, list[int]]:
    """A sequence's rows of a result: its newest token's, then its guesses', of which those count that were right. What
    follows is guessed from the last of these."""
    made: list[TokenOutput] = []
    offered: list[int] = []
    for row in rows:
        token = read_result(row, sequence.request.sampling)
        if isinstance(token, RequestFailed):
            return token, []
        if token is not None:
            made.append(token)
            offered = [token for token in row[RESULT_WIDTH:].tolist() if token != NO_GUESS]
    return tuple(made) or None, offered


class Runner:
    """Turns into launches."""

    def __init__(self, blueprint: Blueprint, launcher: Launcher, publish: Publish | None = None) -> None:
        self._blueprint = blueprint
        self._launcher = launcher
        self._publish = publish

    def launch(self, turn: Turn) -> Launch | None:
        """Start the turn's program; None if it has nothing to do."""
        if not turn.rows and not turn.segments:
            return None
        b = self._blueprint
        size = self._launcher.smallest(*turn.asks)
        packed = pack_plan(
            turn.rows, turn.segments, size, b.segments(size), b.shapes.table_width, b.shapes.lanes
        )
        idle: list[Sequence | None] = [None] * (size.rows - len(turn.rows))
        ended = (s if segment.last else None for segment, s in zip(turn.segments, turn.prefilled))
        sampled: list[Sequence | None] = [*turn.decoded, *idle, *ended]
        aheads = itertools.chain((row.ahead for row in turn.rows), itertools.repeat(0))
        made = self._start(size, packed, self._masks(sampled, aheads, size.rows + b.segments(size)))
        starts = itertools.accumulate((len(segment.tokens) for segment in turn.segments), initial=0)
        scored = tuple(one for one in zip(turn.prefilled, turn.segments, starts) if one[1].targets)
        if scored and made.scores is not None:
            made.scores.copy_to_host_async()
        return Launch(
            made.result, size, sampled, len(turn.rows), turn.prompt_tokens, turn.behind, made.scores, scored
        )

    def _masks(
        self, sequences: Iterable[Sequence | None], aheads: Iterable[int], rows: int
    ) -> np.ndarray | None:
        """int32[rows, mask_width(V)] for the sequence of each row, past so many guesses, see `sampler.exclude`; None if
        none has a grammar."""
        masks: np.ndarray | None = None
        for row, (sequence, ahead) in enumerate(zip(sequences, aheads)):
            if sequence is not None and sequence.guide is not None:
                if masks is None:
                    masks = np.zeros((rows, mask_width(self._blueprint.shapes.vocab)), np.int32)
                masks[row, 0] = 1
                mask = sequence.guide.mask.result()
                masks[row, 1:] = sequence.guide.guesses[ahead - 1].mask if ahead else mask
        return masks

    def _start(self, size: Size, packed: np.ndarray, masks: np.ndarray | None) -> Made:
        if self._publish is not None:
            self._publish(size, packed, masks)
        made = self._launcher.launch(size, packed, masks)
        made.result.copy_to_host_async()
        return made
