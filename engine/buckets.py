"""The padded sizes programs are compiled for. Few, because each costs compile time; fine, because padding costs work."""

from collections.abc import Sequence
from dataclasses import dataclass

from .turn import Size

SEGMENTS = 8
"""Most requests that share a prefill launch."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a platform gets unless told otherwise."""

    lanes: int
    chunk_tokens: int
    least_tokens: int
    """Of the smallest piece of a prompt with which much is computed."""
    few_tokens: int
    """Of the smallest piece of all, for whose tokens reading a long context takes as long as a step."""
    cheap_rows: int
    """Rows of a decode step up to which it costs about what one row does, because reading the weights takes longer than
    computing: where lanes leave some of them free, guesses may have them."""


DEFAULTS = {
    "cpu": Defaults(16, 128, 8, 4, 16),
    "gpu": Defaults(128, 2048, 64, 64, 128),
    "tpu": Defaults(64, 1024, 64, 64, 128),
}


def most_decode_rows(lanes: int, guesses: int, cheap_rows: int) -> int:
    """Rows of the largest decode program: a lane takes one, and one for each guess at what it says next."""
    return max(lanes, min(lanes * (1 + guesses), cheap_rows))


def decode_rows(lanes: int, data: int) -> tuple[int, ...]:
    """Row counts of the decode programs: powers of two up to the number of lanes, each divisible over the mesh's data
    axis, so that one request does not pay for all lanes."""
    sizes = {lanes}
    size = data
    while size < lanes:
        sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))


def prefill_tokens(chunk_tokens: int, smallest: int) -> tuple[int, ...]:
    """Token counts of the prefill programs: halves of the chunk down to `smallest`."""
    sizes = [chunk_tokens]
    while sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return tuple(sorted(sizes))


def launch_sizes(
    lanes: int,
    data: int,
    chunk_tokens: int,
    least_tokens: int,
    few_tokens: int | None = None,
    most_rows: int | None = None,
) -> tuple[Size, ...]:
    """Everything to compile, smallest first: decodes, prompts, and both in one launch.

    Of these there are few: the smallest piece of a prompt beside one lane, a quarter of them or all; twice as much beside one,
    every second size and a whole chunk beside all; `few_tokens`, if that is less, beside these and half of them. A prompt that
    fits beside one lane has no program of its own.
    """
    rows, tokens = decode_rows(lanes, data), prefill_tokens(chunk_tokens, least_tokens)
    guessing = decode_rows(most_rows or lanes, data)  # nobody guesses beside prompts
    one, quarter, half = rows[0], rows[max(0, len(rows) - 3)], rows[max(0, len(rows) - 2)]
    beside = (one, tokens[:2]), (quarter, tokens[:1]), (lanes, (*tokens[::2], tokens[-1]))
    mixed = {Size(some, count) for some, counts in beside for count in counts}
    if few_tokens and few_tokens < tokens[0]:
        mixed |= {Size(some, few_tokens) for some in (one, quarter, half, lanes)}
    sizes = {Size(some, 0) for some in (*rows, *guessing)} | mixed | {Size(0, count) for count in tokens[2:]}
    return tuple(sorted(sizes, key=lambda size: (sum(size), size)))


def covering(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Of each kind of launch (lanes, prompts, both) the sizes that no other of that kind can stand in for: mostly one."""

    def stands_in(other: Size, size: Size) -> bool:
        return other != size and (other.rows > 0) == (size.rows > 0) and other.holds(*size)

    return tuple(size for size in sizes if not any(stands_in(other, size) for other in sizes))
