"""The prefix cache as a file: pages of keys and values, and the hashes they are found by, from one life of an engine to the next.

A safetensors file. `pages` uint8[n, bytes of a page] is what they hold, least recently used first; `digests` uint8[n, 16] tell
of each whether it is whole; `keys` uint8[n, 16] are what they are found by. The header's `identity` names all that the
contents depend on. Knows bytes; not the device, nor what is in a page.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

KEY_BYTES = 16
_FORMAT = "xlane prefix cache 3"
"""Counts how keys are made, too: under keys of another making pages could be found by whom they are not for."""
_MOST_HEADER_BYTES = 1 << 20


class UnusableFile(Exception):
    """What is there is no prefix cache, is damaged, or belongs to another model or layout."""


def write(path: Path, identity: str, page_bytes: int, keys: list[bytes], pages: Iterable[np.ndarray]) -> None:
    """Write all pages, given in groups uint8[some, page_bytes]; the file is there whole or not at all.

    Raises OSError.
    """
    count = len(keys)
    head = _header(identity, page_bytes, count)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(head)
            digests: list[bytes] = []
            for group in pages:
                for page in group:
                    digests.append(_digest(keys[len(digests)], page))
                    file.write(page)
            file.write(b"".join(digests))
            file.write(b"".join(keys))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, identity: str, page_bytes: int, most: int) -> tuple[list[bytes], np.ndarray]:
    """The most recently used pages, at most `most` of them -> their keys, and uint8[n, page_bytes], least recently used first.

    Raises FileNotFoundError, and UnusableFile if it is damaged or not of this identity.
    """
    with path.open("rb") as file:
        start, count = _check_header(file, identity, page_bytes)
        size = path.stat().st_size
        if size != start + count * (page_bytes + 2 * KEY_BYTES):
            raise UnusableFile(f"it has {size} bytes, not what its header says")
    body = np.memmap(path, np.uint8, "r", start)
    pages, digests, keys = np.split(body, [count * page_bytes, count * (page_bytes + KEY_BYTES)])
    first = max(0, count - most)
    kept = pages.reshape(count, page_bytes)[first:]
    names = [key.tobytes() for key in keys.reshape(count, KEY_BYTES)[first:]]
    for key, page, digest in zip(names, kept, digests.reshape(count, KEY_BYTES)[first:]):
        if _digest(key, page) != digest.tobytes():
            raise UnusableFile("a page of it is damaged")
    return names, kept


def _header(identity: str, page_bytes: int, count: int) -> bytes:
    """The length of the header, and the header."""
    end = count * page_bytes
    head = {
        "__metadata__": {"format": _FORMAT, "identity": identity},
        "pages": _tensor([count, page_bytes], 0, end),
        "digests": _tensor([count, KEY_BYTES], end, end + count * KEY_BYTES),
        "keys": _tensor([count, KEY_BYTES], end + count * KEY_BYTES, end + 2 * count * KEY_BYTES),
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}


def _check_header(file: BinaryIO, identity: str, page_bytes: int) -> tuple[int, int]:
    """Where the data begins, and how many pages there are. Raises UnusableFile."""
    length = file.read(8)
    text = file.read(min(int.from_bytes(length, "little"), _MOST_HEADER_BYTES))
    try:
        head = json.loads(text)
        theirs, count = head["__metadata__"]["identity"], int(head["pages"]["shape"][0])
    except (ValueError, KeyError, TypeError, IndexError):
        raise UnusableFile("it is no prefix cache") from None
    if theirs != identity:
        raise UnusableFile("it comes from another model, other weights or another layout of pages")
    if length + text != _header(identity, page_bytes, count) or count < 1:
        raise UnusableFile("its header is not as this version writes it")
    return len(length) + len(text), count


def _digest(key: bytes, page: np.ndarray) -> bytes:
    return hashlib.blake2b(page.tobytes(), digest_size=KEY_BYTES, key=key).digest()
