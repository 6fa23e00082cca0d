"""Adapters by name: in which slot each lies, who still computes with it, loading one while others are used.

A slot is written only while nobody computes with it, and numbers of an empty slot reach nobody, so requests go on meanwhile.
Writing moves arrays and launches nothing. An adapter that is unloaded is no longer found, but stays for the requests that have it.
Knows slots and files; not what a request is.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..models.config import Lora
from ..models.errors import ModelError
from ..models.lora import Adapter
from ..models.lora_weights import AdapterArrays, is_adapters
from ..models.spec import ParamSpec
from .errors import InvalidRequest
from .launcher import Launcher


class Slot(NamedTuple):
    """Where an adapter lies."""

    number: int
    """From 1 up; 0 for none."""
    digest: str
    """What the adapter's numbers are known by."""


NO_ADAPTER = Slot(0, "")


class Adapters:
    """Those of one engine. Any thread may use it."""

    def __init__(
        self,
        lora: Lora | None,
        arrays: AdapterArrays | None,
        specs: Sequence[ParamSpec],
        launcher: Launcher,
        computes_with: Callable[[int], bool],
    ) -> None:
        """
        Args:
            lora: those that are there, and the slots; None without any.
            arrays: makes what a slot holds; None where none can be loaded.
            specs: of the model's parameters.
            launcher: has these on the devices.
            computes_with: whether any request has the adapter of a slot.
        """
        self._arrays, self._launcher, self._computes_with = arrays, launcher, computes_with
        self._specs = [(place, spec) for place, spec in enumerate(specs) if is_adapters(spec)]
        self._numbers = range(1, 1 + (0 if lora is None else lora.slots))
        named = () if lora is None else zip(lora.names, self._numbers, lora.digests)
        self._slots = {name: Slot(number, digest) for name, number, digest in named}
        self._taken: Counter[int] = Counter()
        """Slots that requests on their way in have found, or that are being written."""
        self._lock, self._loading = threading.Lock(), threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Those a request may ask for."""
        with self._lock:
            return tuple(self._slots)

    @contextmanager
    def found(self, name: str) -> Iterator[Slot]:
        """The slot of an adapter, which stays as it is to the end of the block. Raises InvalidRequest."""
        if not name:
            yield NO_ADAPTER
            return
        with self._lock:
            if (slot := self._slots.get(name)) is None:
                raise InvalidRequest(_unknown(name, self._slots))
            self._taken[slot.number] += 1
        try:
            yield slot
        finally:
            with self._lock:
                self._taken[slot.number] -= 1

    def load(self, name: str, folder: str, digest: str = "") -> str:
        """Read an adapter into a free slot -> its digest. One of this name is replaced, for requests to come.

        With `digest` only this very adapter will do, and nothing is read if it is there. Raises InvalidRequest.
        """
        with self._loading:
            with self._lock:
                there = self._slots.get(name)
            if there is not None and there.digest == digest:
                return digest
            adapter = self._opened(name, folder)
            if digest not in ("", adapter.digest):
                raise InvalidRequest(f"the adapter in {folder} is another one than {name!r} was before")
            with self._free_slot(name) as number:
                self._write(adapter, number)
                with self._lock:
                    self._slots[name] = Slot(number, adapter.digest)
            return adapter.digest

    def unload(self, name: str) -> None:
        """Let it be found no more. Raises InvalidRequest if it is not there."""
        with self._lock:
            if self._slots.pop(name, None) is None:
                raise InvalidRequest(_unknown(name, self._slots))

    def _opened(self, name: str, folder: str) -> Adapter:
        if self._arrays is None:
            raise InvalidRequest(
                "this engine keeps no place for adapters that are loaded while it serves: start it with --lora-adapters slots=N "
                "(not with --load-format dummy)"
            )
        try:
            adapter = Adapter.open(name, Path(folder))
            self._arrays.check([adapter], [spec for _, spec in self._specs])
        except (ModelError, OSError) as error:
            raise InvalidRequest(f"the adapter {name!r} cannot be loaded: {error}") from error
        return adapter

    @contextmanager
    def _free_slot(self, name: str) -> Iterator[int]:
        """A slot that nobody uses, to be written."""
        with self._lock:
            named = {slot.number for slot in self._slots.values()}
            number = next((n for n in self._numbers if n not in named and self._is_idle(n)), None)
            if number is None:
                left = "" if len(named) < len(self._numbers) else ", unload another"
                raise InvalidRequest(
                    f"no slot is free for the adapter {name!r}: {len(named)} of {len(self._numbers)} have one, and requests use what "
                    f"was in the others; try again later{left}, or keep more (--lora-adapters slots=N)"
                )
            self._taken[number] += 1
        try:
            yield number
        finally:
            with self._lock:
                self._taken[number] -= 1

    def _is_idle(self, number: int) -> bool:
        return not self._taken[number] and not self._computes_with(number)

    def _write(self, adapter: Adapter, number: int) -> None:
        assert self._arrays is not None, "opened by it"
        try:
            # All is read before anything is written: what is wrong in a file leaves the slot as it was.
            read = [(place, *self._arrays.read_slot(spec, adapter)) for place, spec in self._specs]
        except (ModelError, OSError) as error:
            raise InvalidRequest(f"the adapter {adapter.name!r} cannot be loaded: {error}") from error
        for place, values, axis in read:
            self._launcher.write(place, values, axis, (number - 1) * values.shape[axis])


def _unknown(name: str, there: dict[str, Slot]) -> str:
    return f"there is no adapter {name[:200]!r} here (--lora-adapters): {', '.join(there) or 'none'}"
