"""How many prompt tokens a turn may compute beside streams that run, so that they keep their pace.

Every token of a stream waits for the whole turn that makes it, so the pace is what a launch takes. What launches of each
size took lately is known, apart for prompts that read little and much of what was before; from that the largest piece of prompt
is chosen with which a turn keeps to its target. Knows sizes and seconds; no requests, no clock.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from math import inf
from statistics import median

from .turn import Size

STRETCH = 2.0
"""Without a target: how much longer than a turn of decoding alone a turn may take for each prompt it could compute. Beside one, nobody
who reads shall notice; where several wait, as many readers have no token yet, and lanes stand empty meanwhile."""
WINDOW = 9
"""Launches of a size that its cost is told from: a median, which one slow launch does not move."""
LATELY = 512
"""Launches after which what one with prompts took is forgotten: a size that was once too slow is tried again."""
SURE = 3
"""Launches of a size whose median is believed; of fewer the quickest is, and at most what less work makes likely."""
NEAR_TOKENS = 512
"""Prompt tokens behind fewer than so many cost about what the first do. From there on costs are told apart by powers of two."""
HARDLY_LONGER = 1.15
"""Against the next smaller piece: a larger one that takes no more is taken whatever the target, as where a long context costs
the same whatever is added to it."""


class Pace:
    """Chooses among compiled sizes. Used by the engine's thread alone."""

    def __init__(self, sizes: Sequence[Size], target_s: float | None = None) -> None:
        """`sizes` are all that is compiled, smallest first. `target_s` bounds a turn that streams wait for; None: STRETCH
        times a turn without prompts, for each prompt."""
        self._target_s = target_s
        self._launches = 0
        self._took: defaultdict[tuple[Size, int], deque[tuple[int, float]]] = defaultdict(
            lambda: deque(maxlen=WINDOW)
        )
        """By size and reach: the number of each launch, and its seconds."""
        lanes = max(size.rows for size in sizes)
        self._alone = [next(s for s in sizes if s.holds(max(1, rows), 0)) for rows in range(lanes + 1)]
        """By rows that decode: what is launched without prompts."""
        self._beside = [_ascending(sizes, rows) for rows in range(lanes + 1)]
        """By rows that decode: what can be launched with prompts."""

    def observe(self, size: Size, seconds: float, behind: int = 0) -> None:
        """Note what a launch took, from the end of the one before to its own, with prompt tokens `behind` so many."""
        self._launches += 1
        self._took[size, _reach(behind)].append((self._launches, seconds))

    def prompt_tokens(self, rows: int, prompts: int = 1, behind: int = 0) -> int:
        """The budget of a turn in which `rows` lanes decode and so many prompts could be computed, the farthest from position
        `behind` on: the most that a program computes if none decodes, at least the smallest piece if any."""
        best, *larger = self._beside[rows]
        if not rows:
            return larger[-1].tokens if larger else best.tokens
        reach, target_s = _reach(behind), self._target(rows, prompts)
        for size in larger:
            if target_s is None:
                break
            took_s = self._median_s(best, reach)
            bound_s = max(target_s, HARDLY_LONGER * took_s) if took_s is not None else target_s
            if self._expected_s(size, best, reach) > bound_s:
                break
            best = size
        return best.tokens

    def _target(self, rows: int, prompts: int) -> float | None:
        """None while nothing is known."""
        if self._target_s is not None:
            return self._target_s
        quiet_s = self._quiet_s(self._alone[rows])
        return None if quiet_s is None else quiet_s * STRETCH * prompts

    def _lately_s(self, size: Size, reach: int) -> list[float]:
        """What its launches took, of those that still count."""
        since = self._launches - LATELY if size.tokens else 0
        return [seconds for number, seconds in self._took[size, reach] if number > since]

    def _median_s(self, size: Size, reach: int = 0) -> float | None:
        return median(took) if (took := self._lately_s(size, reach)) else None

    def _quiet_s(self, alone: Size) -> float | None:
        """What a turn without prompts takes; where prompts never cease, at least what less work takes."""
        if (took_s := self._median_s(alone)) is not None:
            return took_s
        less = {size for size, _ in self._took if not size.tokens and size < alone}
        known = [took_s for size in less if (took_s := self._median_s(size)) is not None]
        smallest = self._beside[alone.rows][0]
        if (took_s := self._median_s(smallest)) is not None:
            known.append(took_s * alone.rows / sum(smallest))
        return max(known, default=None)

    def _expected_s(self, size: Size, smaller: Size, reach: int) -> float:
        """What it took; or while that is hardly known at most what is likely: in proportion to what less work took."""
        took = self._lately_s(size, reach)
        if len(took) >= SURE:
            return median(took)
        less_s = self._median_s(smaller, reach)
        return min([*took, inf if less_s is None else less_s * sum(size) / sum(smaller)])


def _reach(behind: int) -> int:
    """A number for prompt tokens behind so many others, which they read."""
    return (behind // NEAR_TOKENS).bit_length()


def _ascending(sizes: Sequence[Size], rows: int) -> list[Size]:
    """Sizes that hold so many rows and prompt tokens, the first for each number of tokens."""
    found: list[Size] = []
    for size in sizes:
        if size.tokens > (found[-1].tokens if found else 0) and size.holds(rows, size.tokens):
            found.append(size)
    return found
