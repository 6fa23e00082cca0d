"""Files that may be changed while the server runs. Knows when to look again, not what is in them."""

import os
from collections.abc import Sequence
from time import monotonic

LOOK_EVERY_S = 1.0
"""Time after which a change is seen at the latest, if somebody asks."""


class Watched:
    """Some files, and whether they are others than before. Also right where a link is turned to a new directory, as
    Kubernetes does with what it mounts."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._seen = self._look()
        self._next = monotonic() + LOOK_EVERY_S

    def changed(self) -> bool:
        """Whether one of them is another since this was last true. Asked often, it looks once a second."""
        if monotonic() < self._next:
            return False
        self._next = monotonic() + LOOK_EVERY_S
        before, self._seen = self._seen, self._look()
        return self._seen != before

    def _look(self) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for path in self._paths:
            try:
                at = os.stat(path)
                found.append((at.st_ino, at.st_mtime_ns, at.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found
