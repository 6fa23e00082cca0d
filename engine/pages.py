"""Who holds which pages of the KV pool, and which of them still hold a known prefix. Host values only; no lanes.

A page may have several holders: sequences that begin alike share the pages of what they share. A page that nobody holds
is free; if it has a key, what it holds can be found again until the page is needed, least recently used first. The idea
is vLLM's automatic prefix caching: full pages, named by a chain of hashes (`chain`).
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

ROOT = b""
"""The key before the first page."""


class PageAllocator:
    """Hands out page ids 0 … total-1, all or nothing. Freed pages are reused last in, first out, while still in cache."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.evictions = 0
        self._blank = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._keys: list[bytes | None] = [None] * total
        self._by_key: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages with a key and no holder, least recently used first."""

    @property
    def free(self) -> int:
        """Pages nobody holds, those that are remembered included."""
        return len(self._blank) + len(self._idle)

    @property
    def remembered(self) -> int:
        """Pages that can be found by a key."""
        return len(self._by_key)

    def take(self, count: int) -> list[int] | None:
        """`count` pages to write to, or None and nothing changed if there are not that many."""
        if count > self.free:
            return None
        while len(self._blank) < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._blank.append(page)
            self.evictions += 1
        pages = [self._blank.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for pages found by `find`."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder less. Raises ValueError for a page that is not held: a double free is a bug of the caller.

        Give a sequence's pages in order: of those that become free, the last ones are forgotten first, since a page is
        found only through all before it.
        """
        for page in reversed(pages):
            if not self._holders[page]:
                raise ValueError(f"page {page} is given back but nobody holds it")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._keys[page] is None:
                self._blank.append(page)
            else:
                self._idle[page] = None

    def remember(self, page: int, key: bytes) -> None:
        """A held page is full and will not be written again. A key that is known already stays with its first page."""
        if key not in self._by_key and self._keys[page] is None:
            self._by_key[key] = page
            self._keys[page] = key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest known beginning of a chain; a look, no holder."""
        pages = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def known(self) -> list[tuple[int, bytes]]:
        """Pages that can be found, with their keys, least recently used first; those that are held last."""
        order = [*self._idle, *(page for page in range(self.total) if self._holders[page])]
        return [(page, key) for page in order if (key := self._keys[page]) is not None]

    def idle(self, pages: Sequence[int]) -> int:
        """How many of these nobody holds."""
        return sum(not self._holders[page] for page in pages)

    def held_by(self, holders: Iterable[Sequence[int]]) -> set[int]:
        """Pages that nobody would hold if all of these holders gave theirs back."""
        counts = Counter(page for pages in holders for page in pages)
        return {page for page, count in counts.items() if count == self._holders[page]}

    def disown(self, pages: Sequence[int]) -> None:
        """What these held pages hold is no good: nobody shall find it."""
        for page in pages:
            self._forget(page)

    def _forget(self, page: int) -> None:
        key, self._keys[page] = self._keys[page], None
        if key is not None:
            del self._by_key[key]


def chain(tokens: Sequence[int], page_tokens: int, known: list[bytes], salt: bytes = ROOT) -> None:
    """Extend `known`, the keys of the first pages of `tokens`, to all its full pages.

    A key names a page's tokens and everything before them. 128 bits of BLAKE2: two beginnings never meet by chance, nor by
    malice. Another `salt` makes other keys of the same tokens.
    """
    full = len(tokens) // page_tokens
    for index in range(len(known), full):
        parent = known[-1] if known else salt
        content = np.asarray(tokens[index * page_tokens : (index + 1) * page_tokens], np.int32).tobytes()
        known.append(hashlib.blake2b(content, digest_size=16, key=parent[:64]).digest())


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that `tokens` positions need."""
    return -(-tokens // page_tokens)
