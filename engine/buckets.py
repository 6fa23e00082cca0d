"""The padded sizes programs are compiled for. Few, because each costs compile time; fine, because padding costs work."""

from dataclasses import dataclass

from .turn import Size

SEGMENTS = 8
"""Most requests that share a prefill launch."""
MIXED_TOKENS_A_LANE = 4
"""Most prompt tokens a lane, in a launch that all lanes decode in."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a platform gets unless told otherwise."""

    lanes: int
    chunk_tokens: int
    least_tokens: int
    """Of a prefill program: smaller ones would save nothing."""
    cheap_rows: int
    """Rows of a decode step up to which it costs about what one row does, because reading the weights takes longer than
    computing: where lanes leave some of them free, guesses may have them."""


DEFAULTS = {
    "cpu": Defaults(16, 128, 16, 16),
    "gpu": Defaults(128, 2048, 64, 128),
    "tpu": Defaults(64, 1024, 64, 128),
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
    lanes: int, data: int, chunk_tokens: int, least_tokens: int, most_rows: int | None = None
) -> tuple[Size, ...]:
    """Everything to compile, smallest first: decodes, prompts, and both in one launch.

    Of these there are few. Beside some lanes only the smallest piece of a prompt, with every second number of lanes; beside
    all lanes also larger ones, while they are no more than a few times the lanes' own work.
    """
    rows, tokens = decode_rows(lanes, data), prefill_tokens(chunk_tokens, least_tokens)
    guessing = decode_rows(most_rows or lanes, data)  # nobody guesses beside prompts
    mixed = {Size(some, tokens[0]) for some in rows[::-2]}
    mixed |= {Size(lanes, count) for count in tokens if count <= MIXED_TOKENS_A_LANE * lanes}
    sizes = {*(Size(some, 0) for some in (*rows, *guessing)), *(Size(0, count) for count in tokens), *mixed}
    return tuple(sorted(sizes, key=lambda size: (sum(size), size)))
