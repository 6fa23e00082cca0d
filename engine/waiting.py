"""Sequences without a lane, in the order in which they get one: by priority, then in turns between their owners, then by arrival.

Owners have equal shares of what is computed while they wait, or shares by their weights: the owner who was given least is
next. What an owner was given is counted in tokens, as in "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024),
and an owner who comes after a pause starts where the others are, so that rest is no credit. Somebody alone gets everything.
Knows no lanes and no pages.
"""

import heapq
from collections.abc import Iterator

from .sequence import Sequence

PROMPT_TOKEN, OUTPUT_TOKEN = 1.0, 2.0
"""What a token counts (the paper's weights): one that is made costs a launch its row, prompts are computed many at a time."""


class Waiting:
    """See the module. Used by the engine's thread; its length may be asked from any."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, str], list[tuple[int, Sequence]]] = {}
        """By priority and owner: heaps by arrival. None is empty."""
        self._given: dict[str, float] = {}
        """To each owner, in tokens by its weight."""
        self._last_given = 0.0
        """To the owner whose sequence was taken last, before that."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._queues.values() for _, sequence in queue)

    def rank(self, sequence: Sequence) -> tuple[int, float, int]:
        """Who goes first is least. Changes with what its owner is given."""
        request = sequence.request
        return request.priority, self._given.get(request.owner, 0.0), sequence.arrival

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence: a new one, or one that gave its lane away and so goes before its owner's younger ones."""
        request = sequence.request
        others = {owner for _, owner in self._queues}
        if request.owner not in others:
            least = min((self._given[owner] for owner in others), default=self._last_given)
            self._given[request.owner] = max(self._given.get(request.owner, 0.0), least)
        queue = self._queues.setdefault((request.priority, request.owner), [])
        heapq.heappush(queue, (sequence.arrival, sequence))
        self._length += 1

    def first(self) -> Sequence | None:
        """The one that gets the next lane. O(owners)."""
        heads = (queue[0][1] for queue in self._queues.values())
        return min(heads, key=self.rank, default=None)

    def take(self, sequence: Sequence) -> None:
        """Take out the first."""
        key = sequence.request.priority, sequence.request.owner
        heapq.heappop(self._queues[key])
        self._last_given = self._given[sequence.request.owner]
        self._shrunk(key)

    def drop(self, sequence: Sequence) -> None:
        """Take out any. O(its owner's sequences)."""
        key = sequence.request.priority, sequence.request.owner
        self._queues[key] = [entry for entry in self._queues[key] if entry[1] is not sequence]
        heapq.heapify(self._queues[key])
        self._shrunk(key)

    def _shrunk(self, key: tuple[int, str]) -> None:
        self._length -= 1
        if not self._queues[key]:
            del self._queues[key]

    def charge(self, sequence: Sequence, tokens: float) -> None:
        """So much was given to its owner, in prompt tokens' worth."""
        request = sequence.request
        self._given[request.owner] = self._given.get(request.owner, 0.0) + tokens / request.weight

    def forget(self) -> None:
        """Nobody waits and nobody runs: all begin as equals."""
        self._given.clear()
        self._last_given = 0.0
