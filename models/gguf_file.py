"""A GGUF file as bytes: its metadata, and where each tensor lies. Knows no architecture, no quantisation and no tokenizer.

The `gguf` package's own reader builds a numpy array for every string and needs seconds for the tokens of a vocabulary;
this one walks the same header in milliseconds and checks every length against the file before it believes it.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata value type -> struct letter. 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    """Row-major, outputs first: the header's dimensions, reversed."""
    type_id: int
    """ggml's number of the storage type."""
    start: int
    """Offset of its first byte in the file."""


class GgufFile:
    """The header of one file, read; the tensors' bytes are mapped, not read."""

    def __init__(self, path: Path | str) -> None:
        """Read the header. Raises CheckpointError, naming the file, if it is not a whole GGUF file."""
        self.path = Path(path)
        try:
            self.bytes = np.memmap(self.path, mode="r") if self.path.stat().st_size else np.empty(0, np.uint8)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self._read(_Cursor(self.bytes.data))
        except (struct.error, UnicodeDecodeError) as error:
            raise self.broken(f"the header is truncated or corrupt ({error})") from error

    def broken(self, why: str) -> CheckpointError:
        """An error about this file, to raise."""
        return CheckpointError(f"{self.path}: {why}")

    def _read(self, cursor: "_Cursor") -> None:
        if bytes(self.bytes[:4]) != MAGIC:
            raise self.broken("not a GGUF file (it does not start with 'GGUF')")
        cursor.at = 4
        version = cursor.scalar("I")
        if version not in VERSIONS:
            hint = "; it is big-endian" if version & 0xFFFF == 0 else ""
            raise self.broken(f"GGUF version {version} is not one of {VERSIONS}{hint}")
        tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(pairs):
            key = cursor.string()
            if key in self.metadata:
                raise self.broken(f"metadata key {key} appears twice")
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        if (parts := self.metadata.get("split.count", 1)) not in (0, 1):
            raise self.broken(f"one of {parts} parts; join them first (llama-gguf-split --merge)")
        self._read_tensors(cursor, tensors)

    def _read_tensors(self, cursor: "_Cursor", count: int) -> None:
        found: list[StoredTensor] = []
        for _ in range(count):
            name, rank = cursor.string(), cursor.scalar("I")
            if not 1 <= rank <= MAX_DIMENSIONS:
                raise self.broken(f"tensor {name} has {rank} dimensions")
            shape = tuple(cursor.scalar("Q") for _ in range(rank))[::-1]
            found.append(StoredTensor(name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        align = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(align, int) or align <= 0 or align & (align - 1):
            raise self.broken(f"general.alignment is {align!r}, not a power of two")
        data = -(-cursor.at // align) * align
        for tensor in found:
            if tensor.name in self.tensors:
                raise self.broken(f"tensor {tensor.name} appears twice")
            self.tensors[tensor.name] = StoredTensor(
                tensor.name, tensor.shape, tensor.type_id, data + tensor.start
            )

    def stored_bytes(self, tensor: StoredTensor, row_bytes: int) -> np.ndarray:
        """uint8[rows, row_bytes] of a tensor, still mapped. Raises CheckpointError if the file ends before it does."""
        rows = math.prod(tensor.shape[:-1])
        stop = tensor.start + rows * row_bytes
        if stop > len(self.bytes):
            raise self.broken(
                f"truncated: tensor {tensor.name} ends at byte {stop}, the file at {len(self.bytes)}"
            )
        return self.bytes[tensor.start : stop].reshape(rows, row_bytes)


class _Cursor:
    """Reads little-endian values one after the other; struct.error where the bytes run out."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def scalar(self, letter: str) -> Any:
        value = struct.unpack_from("<" + letter, self.data, self.at)[0]
        self.at += struct.calcsize("<" + letter)
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        # The hot loop of the header: hundreds of thousands of tokens and merges.
        data, at, size, length = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        out: list[str] = []
        for _ in range(count):
            start = at + 8
            at = start + length(data, at)[0]
            if at > size:
                raise struct.error(f"a string of {at - start} bytes at offset {start}")
            out.append(str(data[start:at], "utf-8"))
        self.at = at
        return out

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise struct.error(f"metadata value of type {kind} at offset {self.at}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise struct.error(f"array of type {kind} at offset {self.at}")
        # Checked first: a corrupt count must not allocate.
        width = struct.calcsize("<" + _SCALARS[kind])
        if count * width > len(self.data) - self.at:
            raise struct.error(f"an array of {count} values at offset {self.at}")
        array = np.frombuffer(self.data, "<" + _SCALARS[kind], count, self.at)
        self.at += count * width
        return array.tolist()
