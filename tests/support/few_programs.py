"""Engines of as few programs as do any work, for tests that look at something else: most of a test engine's time is
compiling, and the programs that larger ones can stand in for are for speed alone.

For tests of what a request is alone and among others those launches have to be of different sizes: these have the smallest,
too. What each size computes is looked at in `test_programs` and `test_mixed`, and engines of all sizes in `test_start`,
`test_guided` and `e2e`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from xlane.engine import build
from xlane.engine.buckets import covering, launch_sizes
from xlane.engine.turn import Size


@contextmanager
def few_programs(*, alone: bool = False) -> Iterator[None]:
    """Engines that are built meanwhile have no size that another can stand in for; but all lanes decode in one of their own,
    whether somebody guesses or not, and with `alone` one lane has all its sizes."""

    def needed(lanes: int, *asked: Any) -> tuple[Size, ...]:
        sizes = launch_sizes(lanes, *asked)
        kept = {*covering(sizes), Size(lanes, 0)}
        if alone:
            kept |= {size for size in sizes if size.rows == 1}
        return tuple(size for size in sizes if size in kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "launch_sizes", needed)
        yield
