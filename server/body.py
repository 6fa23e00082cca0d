"""Request bytes → a typed body, or the error that says what is wrong with them. Knows JSON; not what fields mean."""

import re
from typing import TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from .errors import MalformedBody, WrongContentType, WrongShape

T = TypeVar("T", bound=msgspec.Struct)

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>.*?)(?:\[\.\.\.\])?`$")
"""Where msgspec says it went wrong; a key of a mapping, or the value of one, is the mapping's fault."""


async def read_body(request: HttpRequest, kind: type[T]) -> T:
    """The body as a `kind`. Raises WrongContentType, MalformedBody, WrongShape, BodyTooLarge."""
    require_json(request.headers.get("content-type"))
    return decode(await request.body(), kind)


def require_json(content_type: str | None) -> None:
    """Raises WrongContentType. A page of another site can post text/plain without asking, so nothing else is taken."""
    media = (content_type or "").partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        raise WrongContentType("Expected request with `Content-Type: application/json`")


def decode(raw: bytes, kind: type[T]) -> T:
    """JSON text as a `kind`. Raises MalformedBody, WrongShape."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        place = _PLACE.search(text)
        raise WrongShape(
            f"Failed to deserialize the JSON body into the target type: {text}",
            param=(place["path"] or None) if place else _missing_field(text),
        ) from None
    except RecursionError:
        raise MalformedBody("Failed to parse the request body as JSON: nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBody(f"Failed to parse the request body as JSON: {error}") from None


def _missing_field(text: str) -> str | None:
    found = re.search(r"missing required field `(\w+)`", text)
    return found[1] if found else None
