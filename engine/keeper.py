"""The prefix cache over a restart: what the pool remembers is written when the engine ends, and found when it starts.

A file that is damaged or of another model is left alone, with a line in the log: the engine starts without it. Knows pages
and their keys; neither requests nor how pages are stored.
"""

import hashlib
import json
import logging
import time
from pathlib import Path

from . import prefix_file
from .identity import depends_on
from .launcher import Launcher
from .pages import PageAllocator
from .prefix_file import UnusableFile
from .recall import Recall, weights_digest

logger = logging.getLogger(__name__)


class Keeper:
    """Of one engine, before its thread starts and after it has ended."""

    def __init__(
        self, path: Path, most_bytes: int, model_sha: str | None, launcher: Launcher, pages: PageAllocator
    ) -> None:
        """`most_bytes` bounds the file; of more, what was used last is kept."""
        self._path = path
        self._launcher = launcher
        self._pages = pages
        self._recall = Recall(launcher.blueprint)
        self._most_pages = min(pages.total, most_bytes // self._recall.page_bytes)
        self._identity = _identity(launcher, model_sha)

    def load(self) -> None:
        """Take in what the file has."""
        started = time.perf_counter()
        try:
            keys, content = prefix_file.read(
                self._path, self._identity, self._recall.page_bytes, self._most_pages
            )
        except FileNotFoundError:
            return
        except (UnusableFile, OSError) as error:
            logger.warning("the prefix cache in %s is not used: %s", self._path, error)
            return
        taken = self._pages.take(len(keys)) or []
        self._launcher.kv = self._recall.copy_in(self._launcher.kv, taken, content)
        for page, key in zip(taken, keys):
            self._pages.remember(page, key)
        for page in taken:  # one by one, so that what was used last is forgotten last
            self._pages.give_back([page])
        seconds = time.perf_counter() - started
        logger.info("the prefix cache in %s has %d pages, read in %.1f s", self._path, len(keys), seconds)

    def save(self) -> None:
        """Write what the pool remembers. What cannot be written is lost, with a line in the log."""
        known = self._pages.known()[-self._most_pages :] if self._most_pages else []
        if not known:
            return
        started = time.perf_counter()
        content = self._recall.copy_out(self._launcher.kv, [page for page, _ in known])
        keys = [key for _, key in known]
        try:
            prefix_file.write(self._path, self._identity, self._recall.page_bytes, keys, content)
        except OSError as error:
            logger.warning("the prefix cache cannot be written to %s: %s", self._path, error)
            return
        seconds = time.perf_counter() - started
        logger.info("%d pages of the prefix cache are kept in %s, in %.1f s", len(known), self._path, seconds)


def _identity(launcher: Launcher, model_sha: str | None) -> str:
    """Of all that decides what a page holds: the network, its weights, who computes, how tokens are cut into pages."""
    depends = depends_on(launcher.blueprint, "")
    named = {name: depends[name] for name in ("model", "dtype", "quantize", "kv_dtype", "kernels", "mesh")}
    named |= {"page_tokens": launcher.blueprint.shapes.page_tokens, "model_sha": model_sha}
    named["weights"] = weights_digest(launcher.params)
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
