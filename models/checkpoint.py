"""Safetensors, read by ourselves: headers checked once, then only the rows that are asked for.

A file is 8 bytes of header length (little endian), a JSON header of name -> dtype, shape, data_offsets, then the data.
Knows one file or several with an index; not what the tensors mean (`weights.py`).
"""

import json
import math
import os
import shlex
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .bit_tensors import BitTensors
from .errors import CheckpointError
from .fp8 import FP8, Fp8Tensors
from .mxfp4 import Mxfp4Tensors
from .schemes import Schemes
from .weights import Recipe, Weights, refuse_if_any

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": FP8,
}
# Bits, not bytes: newer types are narrower than a byte. Only the size of those is understood.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
_BITS |= {"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_WHOLE_NUMBERS = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_MOST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file, in bytes."""


class SafetensorsSource:
    """The tensors of one checkpoint (a `TensorSource`). Holds no file open, so it needs no closing and any thread may read."""

    def __init__(self, files: Iterable[Path], placed: Mapping[str, str] | None = None) -> None:
        """Read the headers.

        Args:
            files: all files of the checkpoint.
            placed: tensor name to file name, from an index; None if there is none.

        Raises:
            CheckpointError: a file is missing, truncated or malformed, or a tensor is in two files or not where the
                index says.
        """
        problems: list[str] = []
        self._tensors: dict[str, _Tensor] = {}
        for file in files:
            try:
                found = read_header(file)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for name, tensor in found.items():
                if name in self._tensors:
                    problems.append(f"{file}: tensor {name} is also in {self._tensors[name].file.name}")
                self._tensors[name] = tensor
        # A broken file would make every tensor in it missing: say the cause alone.
        if not problems:
            problems += _misplaced(self._tensors, placed)
        refuse_if_any(problems)

    def names(self) -> Iterable[str]:
        """Every tensor that the files hold."""
        return self._tensors.keys()

    def where(self, name: str) -> str:
        """The file a tensor lies in."""
        return str(self._tensors[name].file)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The tensor's type. Raises CheckpointError if it is none of `DTYPES`."""
        tensor = self._tensors[name]
        if tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise CheckpointError(f"{tensor.file}: tensor {name} is {tensor.dtype}; supported types: {known}")
        return DTYPES[tensor.dtype]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the first axis, in a fresh array."""
        return self._read(name, self.dtype(name), start, stop)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same of a tensor of one byte a value, which means something only together with others."""
        tensor = self._tensors[name]
        if _BITS[tensor.dtype] != 8:
            raise CheckpointError(f"{tensor.file}: tensor {name} is {tensor.dtype}; bytes (U8) are expected")
        return self._read(name, np.dtype(np.uint8), start, stop)

    def mapped(self, name: str) -> np.ndarray:
        """The whole tensor, read-only, which lies in the file until it is looked at. Raises CheckpointError for a type that
        NumPy has no name for."""
        tensor = self._tensors[name]
        dtype = DTYPES.get(tensor.dtype) or _WHOLE_NUMBERS.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}, which is not expected there"
            )
        return np.asarray(np.memmap(tensor.file, dtype, "r", tensor.offset, tensor.shape))

    def _read(self, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        tensor = self._tensors[name]
        out = np.empty((stop - start, *tensor.shape[1:]), dtype)
        row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
        _pread_into(out, tensor.file, tensor.offset + start * row_bytes)
        return out


def open_checkpoint(
    directory: Path,
    table: Mapping[str, Recipe],
    ignored: Iterable[str] = (),
    schemes: Schemes = Schemes(),  # noqa: B008
) -> Weights:
    """The weights of a model in Hugging Face's layout, by a family's table. Raises CheckpointError."""
    tensors = open_safetensors(directory)
    if not schemes.rules:
        return Weights(Fp8Tensors(Mxfp4Tensors(tensors)), table, ignored)
    in_bits = BitTensors(tensors, schemes)
    all_bits = Fp8Tensors(in_bits, in_bits)
    return Weights(all_bits, table, (*ignored, *schemes.ignored), all_bits)


def open_safetensors(directory: Path) -> SafetensorsSource:
    """The tensors of `model.safetensors` or of the files that `model.safetensors.index.json` names."""
    if (directory / SINGLE).exists():
        return SafetensorsSource([directory / SINGLE])
    if (directory / INDEX).exists():
        placed = read_index(directory / INDEX)
        return SafetensorsSource([directory / file for file in sorted(set(placed.values()))], placed)
    if any(path.suffix in PICKLES for path in directory.iterdir()):
        raise CheckpointError(f"{directory} {pickle_advice(str(directory))}")
    raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}: there are no weights to load")


def has_weights(directory: Path) -> bool:
    """Whether all files of the weights are there. Raises CheckpointError for an index that is none."""
    if (directory / SINGLE).exists():
        return True
    index = directory / INDEX
    return index.exists() and all((directory / file).exists() for file in set(read_index(index).values()))


def pickle_advice(model: str) -> str:
    """Why a checkpoint of pickles is refused, and the command that converts it."""
    script = "import sys, transformers as t; s, d = sys.argv[1:]; "
    script += "t.AutoModelForCausalLM.from_pretrained(s, dtype='auto').save_pretrained(d); "
    script += "t.AutoTokenizer.from_pretrained(s).save_pretrained(d)"
    target = Path(model).name + "-safetensors"
    return (
        "has its weights as pickles only, which can run code when opened and are never read here. Convert them "
        "where you trust them (needs torch), then serve the result:\n"
        f"  python -c {shlex.quote(script)} {shlex.quote(model)} {shlex.quote(target)}"
    )


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name, from an index."""
    try:
        placed = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no index of safetensors: {error!r}") from None
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path}: weight_map is empty or no object")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{path}: weight_map places {name} in {file!r}, which is no plain file name"
            )
    return placed


def read_header(file: Path) -> dict[str, _Tensor]:
    """Where the tensors of one file lie. Raises CheckpointError if the header or the file's size is wrong."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _MOST_HEADER):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file: {size} bytes, header of {length}"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: the header is malformed: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is malformed: no object")
    header.pop("__metadata__", None)
    tensors, start, end = {}, 8 + length, 0
    for name, entry in sorted(header.items(), key=_begin):
        tensors[name] = _tensor(file, name, entry, start, end)
        end = entry["data_offsets"][1]
    if start + end != size:
        kind = "truncated" if size < start + end else "too long"
        raise CheckpointError(f"{file} is {kind}: {size} bytes, the header promises {start + end}")
    return tensors


def _begin(item: tuple[str, Any]) -> int:
    try:
        return int(item[1]["data_offsets"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return -1


def _tensor(file: Path, name: str, entry: Any, start: int, at: int) -> _Tensor:
    """One entry of a header, which must begin at byte `at` of the data: the format allows neither holes nor overlaps."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        expected = math.prod(shape) * _BITS[dtype] // 8
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header's entry for {name} is malformed: {error!r}") from None
    sound = all(type(size) is int and size >= 0 for size in (*shape, begin, end))
    if not sound or begin != at or end - begin != expected:
        where = f"bytes {begin} to {end}, after {at}"
        raise CheckpointError(f"{file}: tensor {name} ({dtype} {list(shape)}) cannot lie in {where}")
    return _Tensor(file, dtype, shape, start + begin)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return result


def _misplaced(tensors: Mapping[str, _Tensor], placed: Mapping[str, str] | None) -> list[str]:
    if placed is None:
        return []
    problems = [
        f"{tensors[name].file}: holds tensor {name}, which the index does not place there"
        for name in tensors
        if placed.get(name) != tensors[name].file.name
    ]
    return problems + [
        f"{file}: tensor {name}, promised by the index, is missing"
        for name, file in placed.items()
        if name not in tensors
    ]


def _pread_into(out: np.ndarray, file: Path, offset: int) -> None:
    """Fill an array from a file. A short read (the file shrank meanwhile) is an error."""
    buffer = out.reshape(-1).view(np.uint8).data
    descriptor = os.open(file, os.O_RDONLY)
    try:
        while buffer:
            count = os.preadv(descriptor, [buffer], offset)
            if count == 0:
                raise CheckpointError(f"{file} became shorter while it was read")
            buffer, offset = buffer[count:], offset + count
    finally:
        os.close(descriptor)
