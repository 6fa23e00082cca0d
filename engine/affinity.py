"""Which engine computed the beginning of a prompt last, so that the next one that begins alike can find it in a cache.

Of each prompt the beginnings of 1, 2, 4, … pages are remembered, and the longest that is known decides: conversations find
their own engine, prompts that share nothing but instructions find one that has those. Knows pages' keys; no load, no wire.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from .pages import chain
from .request import Request

MOST_PAGES = 128
"""Of a prompt that are looked at: further on there is seldom a second engine that has so much of it."""
MOST_KEYS = 1 << 16
"""Beginnings that are remembered, those used last: some 10 MB."""


class Affinity:
    """The beginnings of the last prompts and who has them."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._owners: OrderedDict[bytes, str] = OrderedDict()

    def keys(self, request: Request) -> Sequence[bytes]:
        """The names of its beginnings, the longest first. What an engine keeps apart (adapters, salts) has other names."""
        chained: list[bytes] = []
        apart = f"{request.adapter}\0{request.cache_salt}".encode()
        salt = hashlib.blake2b(apart, digest_size=16).digest()
        chain(request.prompt_ids[: MOST_PAGES * self._page_tokens], self._page_tokens, chained, salt)
        lengths = (1 << power for power in range(MOST_PAGES.bit_length()))
        return [chained[length - 1] for length in lengths if length <= len(chained)][::-1]

    def owner(self, keys: Sequence[bytes]) -> str | None:
        """Who computed the longest of them that is known."""
        return next((self._owners[key] for key in keys if key in self._owners), None)

    def note(self, keys: Sequence[bytes], owner: str) -> None:
        """From now on it is this engine that has them."""
        for key in keys:
            self._owners[key] = owner
            self._owners.move_to_end(key)
        while len(self._owners) > MOST_KEYS:
            self._owners.popitem(last=False)
