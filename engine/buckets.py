"""The padded sizes programs are compiled for. Few, because each costs compile time; fine, because padding costs work."""

from dataclasses import dataclass

SEGMENTS = 8
"""Most requests that share a prefill launch."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a platform gets unless told otherwise."""

    lanes: int
    chunk_tokens: int


DEFAULTS = {"cpu": Defaults(16, 128), "gpu": Defaults(128, 2048), "tpu": Defaults(64, 1024)}


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
