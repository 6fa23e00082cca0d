"""Which pages of the KV pool are free. Host integers only; knows neither lanes nor tokens."""


class PageAllocator:
    """Hands out page ids 0 … total-1, all or nothing. Freed pages are reused last in, first out, while still in cache."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._held = [False] * total

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None and nothing changed if there are not that many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._held[page] = True
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Return pages. Raises ValueError for a page that is not held: a double free is a bug of the caller."""
        for page in pages:
            if not self._held[page]:
                raise ValueError(f"page {page} is given back but nobody holds it")
            self._held[page] = False
            self._free.append(page)


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that `tokens` positions need."""
    return -(-tokens // page_tokens)
