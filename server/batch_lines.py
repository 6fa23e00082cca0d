"""The two files of a batch, in OpenAI's form: a question a line in, an answer a line out. Knows no server."""

import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import orjson

from .body import decode
from .errors import ServerError
from .options import UsageError

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""What a line may ask."""
_ID = "batch_req_"
_BEGINNING = f'{{"id":"{_ID}'.encode()
"""Of every line that is written here."""


class BatchLine(msgspec.Struct, frozen=True):
    """A line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class Question:
    """A line that can be asked."""

    custom_id: str
    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's whole answer, good or bad."""

    status: int
    headers: Mapping[str, str]
    """By names in lower case."""
    body: bytes


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot."""

    number: int
    """In the file, from 1."""
    custom_id: str | None
    message: str


@dataclass(slots=True)
class Answered:
    """What an output file has already."""

    ids: set[str] = field(default_factory=set)
    bad_lines: set[int] = field(default_factory=set)
    """Numbers of lines without a custom_id."""


def count_lines(path: Path) -> int:
    """How many lines that are not empty. Raises OSError."""
    with path.open("rb") as file:
        return sum(not line.isspace() for line in file)


def read_questions(path: Path, answered: Answered) -> Iterator[Question | BadLine]:
    """The lines that have no answer yet, in order. Raises OSError."""
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.isspace() or number in answered.bad_lines:
                continue
            item = _question(number, raw)
            if item.custom_id is not None:
                if item.custom_id in answered.ids:
                    continue
                first = seen.setdefault(item.custom_id, number)
                if first != number:
                    item = BadLine(
                        number, None, f"custom_id {item.custom_id!r} is that of line {first} already"
                    )
            yield item


def read_answered(path: Path) -> Answered:
    """What is in the output of a run before this one. A line that was cut off is taken out. Raises OSError, and UsageError for
    a file that is something else, which is left as it is."""
    found = Answered()
    if not path.exists():
        return found
    whole = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = _object(raw)
            cut = not raw.endswith(b"\n")
            ours = _begins_answer(raw) if cut else raw.isspace() or str(line.get("id")).startswith(_ID)
            if not ours:
                raise UsageError(
                    f"{path} is no output of a batch, line {number} is no answer: choose another --output"
                )
            if cut:
                break
            whole += len(raw)
            custom_id, error = line.get("custom_id"), line.get("error")
            if isinstance(custom_id, str):
                found.ids.add(custom_id)
            elif isinstance(error, dict) and isinstance(error.get("line"), int):
                found.bad_lines.add(error["line"])
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return found


def answer_line(question: Question, reply: Reply) -> bytes:
    """The line of an answer, good or bad."""
    response = {
        "status_code": reply.status,
        "request_id": reply.headers.get("x-request-id", ""),
        "body": _object(reply.body) or reply.body.decode(errors="replace"),
    }
    return _line(question.custom_id, response, None)


def error_line(bad: BadLine) -> bytes:
    """The line of what could not be asked."""
    error = {"code": "invalid_line", "message": bad.message, "param": None, "line": bad.number}
    return _line(bad.custom_id, None, error)


def _question(number: int, raw: bytes) -> Question | BadLine:
    try:
        line = decode(raw, BatchLine)
    except ServerError as error:
        known = _object(raw).get("custom_id")
        return BadLine(number, known if isinstance(known, str) else None, f"line {number}: {error}")
    if line.method != "POST" or line.url not in ROUTES:
        asked = f"{line.method} {line.url}"[:100]
        why = f"{asked} is not possible in a batch; POST to {', '.join(ROUTES)} is"
    elif line.body.get("stream"):
        why = "`stream` is not possible in a batch: each line gets one answer"
    else:
        return Question(line.custom_id, line.url, line.body)
    return BadLine(number, line.custom_id, f"line {number}: {why}")


def _begins_answer(raw: bytes) -> bool:
    """Whether this can be the beginning of an answer's line."""
    return raw.startswith(_BEGINNING) or _BEGINNING.startswith(raw)


def _object(raw: bytes) -> dict[str, Any]:
    """A JSON object; an empty one if it is something else."""
    try:
        found = orjson.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _line(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    answer_id = f"{_ID}{secrets.token_hex(12)}"
    return (
        orjson.dumps({"id": answer_id, "custom_id": custom_id, "response": response, "error": error}) + b"\n"
    )
