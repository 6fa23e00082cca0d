"""transformers imported without its advice to install PyTorch, which nothing here computes with. Knows its log, not its use."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unadvised() -> Iterator[None]:
    """While it is imported the first time. Its own verbosity can only be set by who has imported it."""
    logger = logging.getLogger("transformers")

    def other(record: logging.LogRecord) -> bool:
        return "PyTorch" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
