"""What a compiled program does between devices, read from its text."""

import math
import re
from typing import Any, NamedTuple

_COLLECTIVE = re.compile(
    r" = (?P<type>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_COPY = re.compile(r" = \w+\[([\d,]*)\]\S* copy\(")


class Collective(NamedTuple):
    kind: str
    elements: int
    """Of its largest result."""
    where: str
    """The names of the traced functions that it comes from."""


def collectives(compiled: Any) -> list[Collective]:
    """Every collective of a compiled program, those under a condition included."""
    found: list[Collective] = []
    for line in compiled.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            sizes = [_elements(shape) for shape in _ARRAY.findall(match["type"])]
            where = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(match["kind"], max(sizes), where[1] if where else ""))
    return found


def copies(compiled: Any, shape: tuple[int, ...]) -> list[str]:
    """The copies of arrays of this shape."""
    wanted = ",".join(map(str, shape))
    return [
        line.strip()
        for line in compiled.as_text().splitlines()
        if (match := _COPY.search(line)) and match[1] == wanted
    ]


def _elements(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size)
