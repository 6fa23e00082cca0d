"""What lies on this process's devices, and the compiled programs over it: launches them, one after another.

In a group of processes each has a launcher over its own devices, and all must make the same launches in the same order.
Knows arrays and programs; not what a launch is for.
"""

from typing import NamedTuple

import jax
import numpy as np

from .programs import Programs
from .sampler import mask_width
from .state import abstract_kv, abstract_state, zeros_like
from .step import Params
from .turn import Size


class Made(NamedTuple):
    """What a launch makes beside the next state."""

    result: jax.Array
    """int32[R, RESULT_WIDTH]: small, always fetched. Rows that decode, then pieces of prompts."""
    scores: jax.Array | None
    """int32[T, SCORE_WIDTH]: log-probabilities of prompt tokens, fetched if somebody asked; None without prompts."""


class Launcher:
    """Parameters, KV pool, lane state and the programs over them."""

    def __init__(self, programs: Programs, params: Params) -> None:
        b = programs.blueprint
        self.blueprint = b
        self.params = params
        self._programs = programs
        self._placement = b.placement
        self.kv = zeros_like(abstract_kv(b.config, b.shapes, b.kv_dtype, b.placement))
        self._state = zeros_like(abstract_state(b.shapes, b.placement, adapters=b.config.lora is not None))
        self._decode_plan: tuple[bytes, jax.Array] | None = None
        self._mask_width = mask_width(b.shapes.vocab)
        self._result_rows = {size: size.rows + b.segments(size) for size in b.sizes}
        self._no_mask = {
            rows: b.placement.put(np.zeros((rows, self._mask_width), np.int32))
            for rows in {*self._result_rows.values()}
        }
        """By number of rows: what is passed where no row is masked. It lies on the device, so it costs no transfer."""

    def smallest(self, rows: int, tokens: int) -> Size:
        """See `Programs.smallest`."""
        return self._programs.smallest(rows, tokens)

    def wait(self) -> None:
        """Until every program is here."""
        self._programs.wait()

    def close(self) -> None:
        """Load no more programs."""
        self._programs.close()

    def launch(self, size: Size, plan: np.ndarray, mask: np.ndarray | None) -> Made:
        """Start a program on its packed plan and the masks of its rows (None: of no row) -> what it will make. Returns at
        once."""
        placed = self._placement.put(plan) if size.tokens else self._put_decode(plan)
        rows = self._result_rows[size]
        if mask is None:
            masks = self._no_mask[rows]
        else:
            masks = self._placement.put(mask.reshape(rows, self._mask_width))
        self.kv, self._state, made = self._programs(size, self.params, self.kv, self._state, placed, masks)
        return Made(*made)

    def write(self, place: int, values: np.ndarray, axis: int, start: int) -> None:
        """Put values from `start` on along an axis of a parameter, for the launches to come. Any one thread may do so: launches
        under way have the array as it was."""
        before = self.params[place]
        assert isinstance(before, jax.Array), "none in few bits is written"
        whole = np.array(before)
        whole[(slice(None),) * axis + (slice(start, start + values.shape[axis]),)] = values
        after = jax.device_put(whole, before.sharding)
        self.params = (*self.params[:place], after, *self.params[place + 1 :])

    def _put_decode(self, plan: np.ndarray) -> jax.Array:
        """Plans are equal for many steps in a row; the one on the device serves again."""
        key = plan.tobytes()
        if self._decode_plan is None or self._decode_plan[0] != key:
            self._decode_plan = (key, self._placement.put(plan))
        return self._decode_plan[1]
