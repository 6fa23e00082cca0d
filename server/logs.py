"""Where log records go: lines for people, or one JSON object a line in the form Text Generation Inference writes.

Nothing is set up by importing this; commands that serve call `setup` once. Knows no progress display: lines are handed
to a function that knows how to print beside one.
"""

import json
import logging
import time
from collections.abc import Callable

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class LinesHandler(logging.Handler):
    """Formats each record as one entry and hands it to `write`."""

    def __init__(self, write: Callable[[str], None], *, json_output: bool) -> None:
        super().__init__()
        self.write = write
        self.setFormatter(JsonFormatter() if json_output else PlainFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging; a log line that cannot be written must not fail the work it tells about."""
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)


class PlainFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z  INFO xlane.server.serve: message`."""

    converter = time.gmtime

    def __init__(self) -> None:
        super().__init__("%(asctime)sZ %(levelname)5s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """TGI's object: timestamp, level, fields.message, target."""

    converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        fields: dict[str, object] = {"message": record.getMessage()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        extra = getattr(record, "fields", None)
        if isinstance(extra, dict):
            fields |= extra
        return json_line(record.levelname, fields, record.name, record.created)


def json_line(level: str, fields: dict[str, object], target: str, at: float | None = None) -> str:
    """One log entry as JSON."""
    at = time.time() if at is None else at
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e6):06d}Z"
    return json.dumps(
        {"timestamp": stamp, "level": level, "fields": fields, "target": target},
        default=str,
        ensure_ascii=False,
    )


def setup(level: str, write: Callable[[str], None], *, json_output: bool) -> None:
    """Send this process's log through `write`: ours from `level` up, other libraries' from warning up."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, LinesHandler)]:
        root.removeHandler(handler)
    root.addHandler(LinesHandler(write, json_output=json_output))
    root.setLevel(max(LEVELS[level], logging.WARNING))
    logging.getLogger("xlane").setLevel(LEVELS[level])
