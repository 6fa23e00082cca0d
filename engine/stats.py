"""What the engine counts about itself. Written by the engine's thread, read by any: plain numbers, no locks needed.

Knows no metrics format; the server turns a snapshot into one.
"""

from collections import deque
from statistics import median

WINDOW = 64
"""Turns that the medians look back on."""


class Counters:
    """Totals since start and medians of the last turns."""

    def __init__(self) -> None:
        self.steps = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self._host_s: deque[float] = deque(maxlen=WINDOW)
        self._step_s: deque[float] = deque(maxlen=WINDOW)

    def turn(self, host_s: float, wall_s: float, *, decode_only: bool) -> None:
        """One turn of the loop: its own work, and its whole length. Only turns without prefill are steps."""
        self._host_s.append(host_s)
        if decode_only:
            self._step_s.append(wall_s)

    @property
    def host_ms(self) -> float:
        """Median work of the host per turn."""
        return 1e3 * median(self._host_s) if self._host_s else 0.0

    @property
    def step_ms(self) -> float:
        """Median time between two decode steps."""
        return 1e3 * median(self._step_s) if self._step_s else 0.0
