"""Launches turns: packs the plan, tells the other processes if there are any, has the program launched, reads back.

Launching returns at once; `Launch.read` waits. Knows arrays and programs; why a lane runs is the scheduler's business.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np

from .batch import pack_prefill, read_result, read_scores
from .errors import RequestFailed
from .launcher import Launcher, Made
from .programs import Blueprint
from .request import TokenOutput
from .sampler import mask_width
from .sequence import Sequence
from .turn import NO_PAGE, ProgramKind, Segment, Turn

Publish = Callable[[ProgramKind, int, np.ndarray, np.ndarray | None], None]
"""Told of every launch, before it is made."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One program under way."""

    result: jax.Array
    sequences: list[Sequence | None]
    """The sequence of each result row; None where the row samples nothing (a chunk that does not end its prompt)."""
    prompt_tokens: int
    """Prompt tokens it computes; 0 for a decode."""
    scores: jax.Array | None = None
    """Of all its prompt tokens, see `prompt_scores`; fetched only if somebody asks."""
    scored: tuple[tuple[Sequence, Segment, int], ...] = ()
    """Who asks: sequence, segment, and where its tokens begin among those of the launch."""

    def read(self) -> list[tuple[Sequence, TokenOutput | RequestFailed | None]]:
        """Wait for the device; then each row's sequence and token (None: the lane had ended before)."""
        rows = np.asarray(self.result)
        return [
            (sequence, read_result(row, sequence.request.sampling))
            for sequence, row in zip(self.sequences, rows)
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


class Runner:
    """Turns into launches."""

    def __init__(self, blueprint: Blueprint, launcher: Launcher, publish: Publish | None = None) -> None:
        self._blueprint = blueprint
        self._launcher = launcher
        self._publish = publish

    def launch(self, turn: Turn) -> list[Launch]:
        """Start the turn's programs, prefill first; the device runs them in this order."""
        launches = []
        if turn.segments:
            launches.append(self._prefill(turn))
        if turn.rows:
            launches.append(self._decode(turn))
        return launches

    def _prefill(self, turn: Turn) -> Launch:
        b = self._blueprint
        count = sum(len(segment.tokens) for segment in turn.segments)
        tokens = next(size for size in b.prefill_tokens if size >= count)
        packed = pack_prefill(turn.segments, b.prefill_segments, tokens, b.shapes.table_width, b.shapes.lanes)
        ended = [
            sequence if segment.last else None for segment, sequence in zip(turn.segments, turn.prefilled)
        ]
        made = self._start("prefill", tokens, packed, self._masks(ended, b.prefill_segments))
        starts = itertools.accumulate((len(segment.tokens) for segment in turn.segments), initial=0)
        scored = tuple(one for one in zip(turn.prefilled, turn.segments, starts) if one[1].targets)
        if scored and made.scores is not None:
            made.scores.copy_to_host_async()
        return Launch(made.result, ended, count, made.scores, scored)

    def _decode(self, turn: Turn) -> Launch:
        b = self._blueprint
        rows = next(size for size in b.decode_rows if size >= len(turn.rows))
        packed = np.full((rows, 3), (b.shapes.lanes, 0, NO_PAGE), np.int32)
        packed[: len(turn.rows)] = turn.rows
        if (packed[:, 2] == NO_PAGE).all():
            packed[:, 1] = 0  # equal plans look equal, so that the one on the device serves again
        made = self._start("decode", rows, packed, self._masks(turn.decoded, rows))
        return Launch(made.result, [*turn.decoded], 0)

    def _masks(self, sequences: Iterable[Sequence | None], rows: int) -> np.ndarray | None:
        """int32[rows, mask_width(V)] for the sequence of each row, see `sampler.exclude`; None if none has a grammar."""
        masks: np.ndarray | None = None
        for row, sequence in enumerate(sequences):
            if sequence is not None and sequence.guide is not None:
                if masks is None:
                    masks = np.zeros((rows, mask_width(self._blueprint.shapes.vocab)), np.int32)
                masks[row, 0] = 1
                masks[row, 1:] = sequence.guide.mask.result()
        return masks

    def _start(self, kind: ProgramKind, size: int, packed: np.ndarray, masks: np.ndarray | None) -> Made:
        if self._publish is not None:
            self._publish(kind, size, packed, masks)
        made = self._launcher.launch(kind, size, packed, masks)
        made.result.copy_to_host_async()
        return made
