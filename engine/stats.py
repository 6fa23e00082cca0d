"""What the engine counts about itself. Written by the engine's thread, read by any: plain numbers, no locks needed.

Knows no metrics format; the server turns a snapshot into one.
"""

from bisect import bisect_left
from collections import deque
from statistics import fmean, median

from .request import ACCEPTED_EDGES, DURATION_EDGES_S, ROWS_EDGES, Histogram, LaunchStats

WINDOW = 64
"""Turns that the medians look back on."""


class Tally:
    """How often a quantity fell between two edges."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def snapshot(self) -> Histogram:
        """The counts so far."""
        return Histogram(tuple(self._counts), self._sum)


class Launches:
    """What launches of one kind took."""

    def __init__(self) -> None:
        self.whole_s, self.device_s, self.emit_s = (Tally(DURATION_EDGES_S) for _ in range(3))

    def snapshot(self) -> LaunchStats:
        """The counts so far."""
        return LaunchStats(self.whole_s.snapshot(), self.device_s.snapshot(), self.emit_s.snapshot())


class Counters:
    """Totals since start and medians of the last turns."""

    def __init__(self) -> None:
        self.steps = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.prefill, self.decode = Launches(), Launches()
        self.prefill_rows = Tally(ROWS_EDGES)
        self.accepted = Tally(ACCEPTED_EDGES)
        self.joins = 0
        self._read_s = self._told_s = 0.0
        self._rested = True
        self._gap_s: deque[float] = deque(maxlen=WINDOW)
        self._host_s: deque[float] = deque(maxlen=WINDOW)
        self._step_s: deque[float] = deque(maxlen=WINDOW)
        self._served_s: deque[float] = deque(maxlen=WINDOW)

    def turn(self, host_s: float, wall_s: float, *, decode_only: bool) -> None:
        """One turn of the loop: its own work, and its whole length. Only turns without prefill are steps."""
        self._host_s.append(host_s)
        if decode_only:
            self._step_s.append(wall_s)

    def launched(self, kind: Launches, launched_s: float, read_s: float, told_s: float) -> float:
        """One launch, which is over: when it was made, read back, and its outputs delivered, on one clock. Returns what
        it took of the device's time.

        A launch is made before the last one is read, so it counts from when the device, or the host, was done with that.
        """
        device_s = read_s - max(launched_s, self._read_s)
        if not self._rested:
            self._gap_s.append(max(0.0, launched_s - self._read_s))
        self._rested = False
        kind.device_s.observe(device_s)
        kind.emit_s.observe(told_s - read_s)
        kind.whole_s.observe(told_s - max(launched_s, self._told_s))
        self._read_s, self._told_s = read_s, told_s
        return device_s

    def rest(self) -> None:
        """There is nothing to do: until the next launch the device waits for requests, not for the host."""
        self._rested = True

    def served(self, seconds: float) -> None:
        """One sequence, from its first launch to its last token."""
        self._served_s.append(seconds)

    def queue_wait_s(self, waiting: int, running: int) -> float:
        """How long a sequence behind `waiting` others waits while `running` run: by Little's law, one of these ends in a
        share of the time that the last ones took. 0 before the first has ended."""
        return fmean(self._served_s) * waiting / max(1, running) if self._served_s else 0.0

    @property
    def gap_ms(self) -> float:
        """Mean time from the end of a launch to the next one, which is 0 where that was made before."""
        return 1e3 * fmean(self._gap_s) if self._gap_s else 0.0

    @property
    def host_ms(self) -> float:
        """Median work of the host per turn."""
        return 1e3 * median(self._host_s) if self._host_s else 0.0

    @property
    def step_ms(self) -> float:
        """Median time between two decode steps."""
        return 1e3 * median(self._step_s) if self._step_s else 0.0
