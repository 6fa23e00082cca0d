"""Reading a Hugging Face config.json without guessing: every key is asked for, known to be harmless, unknown to transformers
too, or refused.

Knows what keys mean to transformers 4 and 5 alike; not what a family does with them (`llama.py` …), nor the
tensors (`hf_names.py`).
"""

import inspect
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..config import Activation
from ..errors import UnsupportedModel
from ..unadvised import unadvised
from .hf_keys import HARMLESS, IGNORABLE, MEANINGFUL

logger = logging.getLogger(__name__)

ACTIVATION_NAMES: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""transformers' names; those that differ only in how they are computed are one here."""


class Fields:
    """The keys of one config.json. What is taken is handled; `finish` refuses what is left and not harmless."""

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = config
        self._where = where
        self._taken: set[str] = set()

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number; required unless the family has a default."""
        value = self._take(key, default)
        if type(value) is not int or value < 1:
            raise self.refusal(key, value, "a positive whole number is expected")
        return value

    def whole(self, key: str, default: int) -> int:
        """A whole number, zero included."""
        value = self._take(key, default)
        if type(value) is not int or value < 0:
            raise self.refusal(key, value, "a whole number is expected")
        return value

    def size_or_all(self, key: str, default: int) -> int:
        """A positive whole number; 0 where -1 stands for all there is."""
        value = self._take(key, default)
        return 0 if value == -1 else self.integer(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; required unless the family has a default."""
        value = self._take(key, default)
        if not _is_positive(value):
            raise self.refusal(key, value, "a positive number is expected")
        return float(value)

    def has(self, key: str) -> bool:
        """Whether it is there, if only as null."""
        return key in self._config

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None when absent or null."""
        return None if self._config.get(key) is None else self.number(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many positive numbers."""
        value = self._take(key, None)
        if not isinstance(value, list) or len(value) != count or not all(map(_is_positive, value)):
            raise self.refusal(key, value, f"a list of {count} positive numbers is expected")
        return tuple(float(x) for x in value)

    def activation(self, *keys: str, default: str) -> Activation:
        """The feed-forward's activation, by transformers' name, under the first of several keys that is there."""
        name = self.text(*keys, default=default)
        if name not in ACTIVATION_NAMES:
            known = ", ".join(ACTIVATION_NAMES)
            raise self.refusal(keys[0], name, f"this activation is not supported (supported: {known})")
        return ACTIVATION_NAMES[name]

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._take(key, default)
        if type(value) is not bool:
            raise self.refusal(key, value, "true or false is expected")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A positive whole number, or None when absent or null."""
        return None if self._config.get(key) is None else self.integer(key)

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one, a list, or none."""
        value = self._take(key, ())
        ids = value if isinstance(value, list | tuple) else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise self.refusal(key, value, "a token id or a list of them is expected")
        return tuple(ids)

    def per_layer(self, key: str, layers: int) -> tuple[Any, ...] | None:
        """One entry a layer, or None when absent or null."""
        if self._config.get(key) is None:
            return None
        value = self._take(key, None)
        if not isinstance(value, list) or len(value) != layers:
            raise self.refusal(
                key, value, f"a list with one entry for each of the {layers} layers is expected"
            )
        return tuple(value)

    def mapping(self, key: str) -> "Fields | None":
        """The fields of an object inside, or None when absent or null."""
        if self._config.get(key) is None:
            return None
        value = self._take(key, None)
        if not isinstance(value, dict):
            raise self.refusal(key, value, "an object is expected")
        return Fields(value, f"{self._where}: {key}")

    def text(self, *keys: str, default: str) -> str:
        """A string under the first of several names that is there; the others must not disagree."""
        given = {key: value for key in keys if (value := self._take(key, None)) is not None}
        for key, value in given.items():
            if not isinstance(value, str) or value != next(iter(given.values())):
                raise self.refusal(key, value, f"one name is expected, found {given}")
        return next(iter(given.values()), default)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings, or of lists of them, in one; empty when absent or null."""
        value = self._take(key, [])
        flat = (
            [name for one in value for name in (one if isinstance(one, list) else [one])]
            if (isinstance(value, list))
            else [value]
        )
        if not all(isinstance(name, str) for name in flat):
            raise self.refusal(key, value, "a list of names is expected")
        return tuple(flat)

    def table(self, key: str) -> Mapping[str, Any]:
        """An object inside as it is; empty when absent or null."""
        return {} if self.mapping(key) is None else self._config[key]

    def one_of(self, key: str, value: Any, *supported: Any) -> None:
        """Refuse a value, already read, that is none of these."""
        if value not in supported:
            raise self.refusal(key, value, f"supported: {', '.join(map(str, supported))}")

    def skip(self, *keys: str) -> None:
        """These keys have no effect on this model, for a reason the caller knows."""
        self._taken.update(keys)

    def finish(self) -> None:
        """Refuse every key that was neither taken nor harmless. What transformers does not read of such a model either, as
        files carry that somebody's own code once read, is told of and left alone."""
        for key, value in self._config.items():
            if key in self._taken or key in IGNORABLE or value is None:
                continue
            if key in HARMLESS and value == HARMLESS[key]:
                continue
            if key in MEANINGFUL or _is_read_by_transformers(key, self._config.get("model_type")):
                raise self.refusal(key, value, _advice(key))
            unread = "%s: %s = %.200r: neither transformers nor xlane reads it of such a model"
            logger.warning(unread, self._where, key, value)

    def _take(self, key: str, default: Any) -> Any:
        self._taken.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def raw(self, key: str) -> Any:
        """Whatever is there; None when absent."""
        return self._take(key, None)

    def refusal(self, key: str, value: Any, why: str) -> UnsupportedModel:
        """The error that says which value of which key is not supported, and why."""
        if value is None:
            return UnsupportedModel(f"{self._where}: {key} is missing; {why}")
        shown = repr(value)
        return UnsupportedModel(f"{self._where}: {key} = {shown[:200]}: {why}")


def _is_read_by_transformers(key: str, model_type: str | None) -> bool:
    """Whether its configuration of this kind of model takes the key; of a kind that it does not know all may be read."""
    known = _keys_of_transformers(model_type)
    return known is None or key in known


@cache
def _keys_of_transformers(model_type: str | None) -> frozenset[str] | None:
    with unadvised():  # a second's import, for what is rarely asked
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    if model_type is None or model_type not in CONFIG_MAPPING:
        return None
    theirs = CONFIG_MAPPING[model_type]
    names = set(theirs.attribute_map)
    for part in theirs.__mro__:
        names |= {*inspect.signature(part.__init__).parameters, *vars(part).get("__annotations__", {})}
    return frozenset(names)


def _advice(key: str) -> str:
    if key == "auto_map":
        return "the model brings its own code, which is never run here"
    return "this option is not understood, and leaving it out could change the model's answers"


def _is_positive(value: Any) -> bool:
    """A number above 0 that a float holds; JSON as Python reads it knows Infinity, and integers of any length."""
    return type(value) in (int, float) and 0 < value <= 1e308


def eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Ids that end a text: generation_config.json's where it names any, else config.json's."""
    named = Fields(generation or {}, "generation_config.json").ids("eos_token_id")
    return named or Fields(config).ids("eos_token_id")
