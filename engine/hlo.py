"""What a compiled program does, read from its text: what it moves between devices, copies, orders and calls.

Knows the compilers' notation and no engine.
"""

import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(
    r" = (?P<type>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_MOVE = re.compile(r" = \(?\w+\[([\d,]*)\]\S* (?:copy|copy-start|transpose)\(")
_SORT = re.compile(
    r" = (?P<type>.*) (?:sort\(|topk\(|custom-call\(.*custom_call_target=\"(?:TopK|\w*[Ss]ort\w*)\")"
)
_ALIAS = re.compile(r"\b(?:may|must)-alias\b")
_NAMED = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    kind: str
    elements: int
    """Of its largest result."""
    where: str
    """The names of the traced functions that it comes from."""


def collectives(text: str) -> list[Collective]:
    """Every collective of a program, those under a condition included."""
    found: list[Collective] = []
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            sizes = [_elements(shape) for shape in _ARRAY.findall(match["type"])]
            where = _NAMED.search(line)
            found.append(Collective(match["kind"], max(sizes), where[1] if where else ""))
    return found


def moves(text: str, elements: int) -> list[str]:
    """The lines that copy or turn round an array of at least so many elements."""
    return [
        line.strip()
        for line in text.splitlines()
        if (match := _MOVE.search(line)) and _elements(match[1]) >= elements
    ]


def sorts(text: str, elements: int) -> list[str]:
    """The lines that put at least so many elements in order, or look for the first of them."""
    found: list[str] = []
    for line in text.splitlines():
        if match := _SORT.search(line):
            # What is ordered is an operand; where only the first are kept, it does not show in the result.
            sizes = [_elements(shape) for shape in _ARRAY.findall(match["type"])]
            if " sort(" not in line or max(sizes) >= elements:
                found.append(line.strip())
    return found


def aliases(text: str) -> int:
    """How many of a program's arguments become its results in place."""
    return len(_ALIAS.findall(text.partition("\n")[0]))


def _elements(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size)
