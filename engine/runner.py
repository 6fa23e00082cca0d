"""Owns what is on the device and launches turns: packs the plan, calls a compiled program, reads the result back.

Launching returns at once; `Launch.read` waits. Knows arrays and programs; why a lane runs is the scheduler's business.
"""

from dataclasses import dataclass

import jax
import numpy as np

from .batch import pack_prefill, read_result
from .programs import Programs
from .request import TokenOutput
from .sequence import Sequence
from .state import abstract_kv, abstract_state, zeros_like
from .turn import NO_PAGE, Turn


@dataclass(frozen=True, slots=True)
class Launch:
    """One program under way."""

    result: jax.Array
    sequences: list[Sequence | None]
    """The sequence of each result row; None where the row samples nothing (a chunk that does not end its prompt)."""
    prompt_tokens: int
    """Prompt tokens it computes; 0 for a decode."""

    def read(self) -> list[tuple[Sequence, TokenOutput | None]]:
        """Wait for the device; then each row's sequence and token (None: the lane had ended before)."""
        rows = np.asarray(self.result)
        return [
            (sequence, read_result(row, sequence.request.sampling))
            for sequence, row in zip(self.sequences, rows)
            if sequence is not None
        ]


class Runner:
    """Parameters, KV pool, lane state and the programs over them."""

    def __init__(self, programs: Programs, params: tuple[jax.Array, ...]) -> None:
        blueprint = programs.blueprint
        self._programs = programs
        self._blueprint = blueprint
        self._params = params
        self._kv = zeros_like(
            abstract_kv(blueprint.config, blueprint.shapes, blueprint.dtype, blueprint.placement)
        )
        self._state = zeros_like(abstract_state(blueprint.shapes, blueprint.placement))
        self._decode_plan: tuple[bytes, jax.Array] | None = None

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
        self._kv, self._state, result = self._programs.prefill(
            tokens, self._params, self._kv, self._state, self._put(packed)
        )
        result.copy_to_host_async()
        ended = [
            sequence if segment.last else None for segment, sequence in zip(turn.segments, turn.prefilled)
        ]
        return Launch(result, ended, count)

    def _decode(self, turn: Turn) -> Launch:
        b = self._blueprint
        rows = next(size for size in b.decode_rows if size >= len(turn.rows))
        packed = np.full((rows, 3), (b.shapes.lanes, 0, NO_PAGE), np.int32)
        packed[: len(turn.rows)] = turn.rows
        if (packed[:, 2] == NO_PAGE).all():
            packed[:, 1] = 0  # equal plans look equal, so that the one on the device serves again
        key = packed.tobytes()
        if self._decode_plan is None or self._decode_plan[0] != key:
            self._decode_plan = (key, self._put(packed))
        self._kv, self._state, result = self._programs.decode(
            rows, self._params, self._kv, self._state, self._decode_plan[1]
        )
        result.copy_to_host_async()
        return Launch(result, list(turn.decoded), 0)

    def _put(self, array: np.ndarray) -> jax.Array:
        """The same array on every device of the mesh."""
        return jax.device_put(array, self._blueprint.placement.replicated)
