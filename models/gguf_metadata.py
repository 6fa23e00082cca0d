"""What a GGUF file says under its architecture's name, typed. Knows no architecture, and not what a key means.

Whoever reads a key has understood it: `finish` refuses what is left.
"""

from collections.abc import Mapping
from typing import Any

from .errors import UnsupportedModel
from .gguf_file import GgufFile

_NOTHING = frozenset({"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"})
"""Keys that say nothing new."""


class Metadata:
    """The keys of one architecture in one file."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self._prefix = architecture + "."
        self._read: set[str] = set()

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number, not 0 unless there is a default; one for all layers where the file has one for each."""
        value = self._get(key, default)
        if type(value) is not int or value < (default is None):
            raise self.refused(key, value, "a whole number is expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, as the person wrote it who chose it: before it was rounded to float32."""
        value = self._get(key, default)
        if not isinstance(value, int | float):
            raise self.refused(key, value, "a number is expected")
        return float(f"{value:.6g}")  # 9.99999974e-06 -> 1e-05

    def text(self, key: str, default: str) -> str:
        """A name."""
        return str(self._get(key, default))

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.refused(key, value, "true or false is expected")
        return value

    def given(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The numbers that are there, of these keys, under config.json's names."""
        there = {key: name for key, name in names.items() if self.says(key)}
        return {name: self._whole(key) for key, name in there.items()}

    def says(self, key: str) -> bool:
        """Whether the file has this key."""
        return self._prefix + key in self.file.metadata

    def holds(self, tensor: str) -> bool:
        """Whether the file has this tensor."""
        return tensor in self.file.tensors

    def finish(self) -> None:
        """Refuse every key that nobody read."""
        for key, value in self.file.metadata.items():
            own = key.removeprefix(self._prefix)
            if own != key and own not in self._read | _NOTHING:
                raise self.refused(own, value, "this option is not understood")

    def refused(self, key: str, value: object, why: str) -> UnsupportedModel:
        """The error that says which value of which key is not supported, and why."""
        return UnsupportedModel(f"{self.file.path}: {self._prefix}{key} = {value!r}: {why}")

    def _whole(self, key: str) -> int | float:
        value = self._get(key, None)
        return value if type(value) is int else self.number(key)

    def _get(self, key: str, default: object) -> object:
        self._read.add(key)
        value = self.file.metadata.get(self._prefix + key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.refused(key, value, "layers must be alike")
            value = value[0]
        if value is None:
            raise UnsupportedModel(f"{self.file.path}: {self._prefix}{key} is missing")
        return value
