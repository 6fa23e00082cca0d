"""What `xlane doctor` says of one thing. Knows nothing of the things."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one thing."""

    name: str
    status: Status
    found: str
    do: str = ""
    """What helps; empty if all is well, or if what was found says it."""
