"""How many prompt tokens a turn may compute beside streams that run, so that they keep their pace.

Every token of a stream waits for the whole turn that makes it, so the pace is what a launch takes. What launches of each
size took so far is known; from that the largest piece of prompt is chosen with which a turn keeps to its target. Knows
sizes and seconds; no requests, no clock.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

from .turn import Size

STRETCH = 2.0
"""Without a target: how much longer than a turn of decoding alone a turn may take for each prompt it could compute. Beside one, nobody
who reads shall notice; where several wait, as many readers have no token yet, and lanes stand empty meanwhile."""
WINDOW = 9
"""Launches of a size that its cost is told from: a median, which one slow launch does not move."""
HARDLY_LONGER = 1.15
"""Against the next smaller piece: a larger one that takes no more is taken whatever the target, as where a long context costs
the same whatever is added to it."""


class Pace:
    """Chooses among compiled sizes. Used by the engine's thread alone."""

    def __init__(self, sizes: Sequence[Size], target_s: float | None = None) -> None:
        """`sizes` are all that is compiled, smallest first. `target_s` bounds a turn that streams wait for; None: STRETCH
        times a turn without prompts, for each prompt."""
        self._target_s = target_s
        self._took_s = {size: deque[float](maxlen=WINDOW) for size in sizes}
        lanes = max(size.rows for size in sizes)
        self._alone = [next(s for s in sizes if s.holds(max(1, rows), 0)) for rows in range(lanes + 1)]
        """By rows that decode: what is launched without prompts."""
        self._beside = [_ascending(sizes, rows) for rows in range(lanes + 1)]
        """By rows that decode: what can be launched with prompts."""

    def observe(self, size: Size, seconds: float) -> None:
        """Note what a launch took, from the end of the one before to its own."""
        self._took_s[size].append(seconds)

    def prompt_tokens(self, rows: int, prompts: int = 1) -> int:
        """The budget of a turn in which `rows` lanes decode and so many prompts could be computed: the most that a program
        computes if none does, at least the smallest piece if any."""
        best, *larger = self._beside[rows]
        if not rows:
            return larger[-1].tokens if larger else best.tokens
        target_s = self._target(rows, prompts)
        for size in larger:
            if target_s is None:
                break
            took = self._took_s[best]
            bound_s = max(target_s, HARDLY_LONGER * median(took)) if took else target_s
            if self._expected_s(size, best) > bound_s:
                break
            best = size
        return best.tokens

    def _target(self, rows: int, prompts: int) -> float | None:
        """None while nothing is known."""
        if self._target_s is not None:
            return self._target_s
        quiet_s = self._took(self._alone[rows])
        return None if quiet_s is None else quiet_s * STRETCH * prompts

    def _took(self, alone: Size) -> float | None:
        """What a turn without prompts takes; where prompts never cease, at least what less work takes."""
        if took := self._took_s[alone]:
            return median(took)
        known = [
            median(took) for size, took in self._took_s.items() if took and not size.tokens and size < alone
        ]
        smallest = self._beside[alone.rows][0]
        if took := self._took_s[smallest]:
            known.append(median(took) * alone.rows / sum(smallest))
        return max(known, default=None)

    def _expected_s(self, size: Size, smaller: Size) -> float:
        """What it took, or at most: more work takes no longer than in proportion to what less took."""
        known = [median(took) for took in (self._took_s[size],) if took]
        if took := self._took_s[smaller]:
            known.append(median(took) * sum(size) / sum(smaller))
        return min(known, default=float("inf"))


def _ascending(sizes: Sequence[Size], rows: int) -> list[Size]:
    """Sizes that hold so many rows and prompt tokens, the first for each number of tokens."""
    found: list[Size] = []
    for size in sizes:
        if size.tokens > (found[-1].tokens if found else 0) and size.holds(rows, size.tokens):
            found.append(size)
    return found
