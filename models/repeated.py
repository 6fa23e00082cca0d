"""Several copies of each kv head: where more devices share a model than it has kv heads, each needs one of its own.

A query head reads the keys it read before, so the model stays what it is; keys and values take that much more memory. Knows
parameters by their descriptions (`spec.py`), no checkpoint and no device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .config import ModelConfig
from .spec import ParamSpec
from .weights import Index, WeightSource

KEYS = {"qkv": 2, "k_norm": 1, "q_norm": 0, "sinks": 0}
"""Parameters by kv head, and how many of a head's members are not query heads: they stand behind these."""


def for_devices(config: ModelConfig, count: int) -> ModelConfig:
    """The same model with a kv head for each of `count` devices, if it has fewer; as it is where heads do not divide."""
    copies, rest = divmod(count, config.kv_heads)
    if config.latent or copies < 2 or rest or config.heads % count:
        return config
    return replace(config, kv_heads=count, kv_copies=copies)


@dataclass(frozen=True, slots=True)
class RepeatedHeads:
    """A `WeightSource` of a model with `kv_copies`, out of one that has each kv head once."""

    source: WeightSource
    config: ModelConfig

    def check(self, specs: Sequence[ParamSpec]) -> None:
        """See `WeightSource.check`."""
        self.source.check([self._once(spec) for spec in specs])

    def read(self, spec: ParamSpec, index: Index) -> np.ndarray:
        """See `WeightSource.read`."""
        once = self._once(spec)
        if once is spec:
            return self.source.read(spec, index)
        if len(spec.shape) == 1:  # all keys' scales in a row
            whole = self.source.read(once, (slice(None),)).reshape(-1, self.config.head_dim)
            return whole.repeat(self.config.kv_copies, axis=0).reshape(-1)[index[0]]
        return self._spread(spec, self.source.read(once, self._heads(spec, index)), index)

    def by_entry(self, spec: ParamSpec) -> bool:
        """See `WeightSource.by_entry`."""
        return self.source.by_entry(self._once(spec))

    def read_parts(self, spec: ParamSpec, index: Index) -> list[np.ndarray]:
        """See `WeightSource.read_parts`."""
        once = self._once(spec)
        if once is spec:
            return self.source.read_parts(spec, index)
        return [
            self._spread(spec, part, index) for part in self.source.read_parts(once, self._heads(spec, index))
        ]

    def _once(self, spec: ParamSpec) -> ParamSpec:
        """What the source has of it; the same where that is the same."""
        copies, name = self.config.kv_copies, _name(spec)
        if spec.axes[0] == "kv_heads":
            heads, members, *rest = spec.shape
            members = (members - KEYS[name]) * copies + KEYS[name]
            return replace(spec, shape=(heads // copies, members, *rest))
        if name == "k_norm" and self.config.qk_norm == "row":
            return replace(spec, shape=(spec.shape[0] // copies,))
        return spec

    def _heads(self, spec: ParamSpec, index: Index) -> Index:
        """Whole heads of the source, of which a slice has copies."""
        start, stop, _ = index[0].indices(spec.shape[0])
        copies = self.config.kv_copies
        return slice(start // copies, -(-stop // copies)), slice(None), *index[2:]

    def _spread(self, spec: ParamSpec, heads: np.ndarray, index: Index) -> np.ndarray:
        """Copies of heads [k, members, …], each with its share of the queries, cut out of as `index` says."""
        copies, queries = self.config.kv_copies, heads.shape[1] - KEYS[_name(spec)]
        count, share = len(heads) * copies, queries // copies
        shared = heads[:, :queries].reshape(count, share, *heads.shape[2:])
        spread = np.concatenate([shared, heads[:, queries:].repeat(copies, axis=0)], axis=1)
        start, stop, _ = index[0].indices(spec.shape[0])
        first = start - start % copies
        return np.ascontiguousarray(spread[start - first : stop - first, index[1]])


def _name(spec: ParamSpec) -> str:
    """`qkv` of layers.3.qkv.weight."""
    return spec.path.split(".")[2] if spec.path.startswith("layers.") else ""
