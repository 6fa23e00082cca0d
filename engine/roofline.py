"""The shortest time a launch can take: bytes that must be read over memory's rate, or operations over arithmetic's.

A bound, not a promise: what is not counted (launches, sampling, traffic between devices, activations) only adds. Knows a
model's sizes and what a device can do; measures nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..models.config import ModelConfig
from ..models.spec import ParamSpec
from .state import page_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A model on so many devices of one kind, its weights and KV split over them evenly."""

    config: ModelConfig
    specs: Sequence[ParamSpec]
    kv_dtype: str
    kv_rows: tuple[int, int] | None
    """See `Shapes.kv_rows`."""
    split: int
    """Devices one copy of the model is split over."""
    copies: int
    """Such groups, each with its part of the rows."""
    read_bytes_per_s: float
    """Of one device."""
    flops_per_s: float
    """Of one device."""

    def decode_s(self, rows: int, context_tokens: int) -> float:
        """One step of `rows` lanes that each hold `context_tokens`."""
        rows = -(-rows // self.copies)
        weights = sum(self._read_bytes(spec, rows) for spec in self.specs)
        kv = rows * context_tokens * page_bytes(self.config, 1, self.kv_dtype, self.kv_rows)
        # In latent form every device reads the whole of it, for its own heads.
        read = weights / self.split + kv / (1 if self.config.latent else self.split)
        return max(read / self.read_bytes_per_s, self._flops_s(rows, rows * context_tokens))

    def prefill_s(self, tokens: int) -> float:
        """The KV of one prompt; of its logits one row is computed."""
        weights = sum(self._read_bytes(spec, tokens) for spec in self.specs)
        return max(
            weights / self.split / self.read_bytes_per_s, self._flops_s(tokens, tokens * tokens / 2, 1)
        )

    def _flops_s(self, tokens: int, keys_seen: float, logits_rows: int | None = None) -> float:
        """Two operations a weight and token, and two a key or value that a query head meets."""
        head = self.config.vocab_size * self.config.hidden_size
        inner = sum(
            self._chosen(spec) * math.prod(spec.shape)
            for spec in self.specs
            if len(spec.shape) > 1 and not self._is_table(spec) and not spec.path.startswith("head.")
        )
        logits = head * (tokens if logits_rows is None else logits_rows)
        attention = 2 * self.config.layers * self.config.heads * self.config.head_dim * keys_seen
        return 2 * (inner * tokens + logits + attention) / self.split / self.flops_per_s

    def _read_bytes(self, spec: ParamSpec, tokens: int) -> float:
        """Of a parameter, for so many tokens of each copy; experts lie over all devices, and get the tokens of all copies."""
        experts = self.config.experts
        if experts and "experts" in spec.axes and experts.count % (self.split * self.copies) == 0:
            return self._touched(spec, tokens * self.copies) * spec.nbytes / self.copies
        return self._touched(spec, tokens) * spec.nbytes

    def _touched(self, spec: ParamSpec, tokens: int) -> float:
        """The part of a parameter that a launch reads: of a table some rows, of experts those that tokens go to."""
        if self._is_table(spec):
            return 1.0 if self.config.tied_embeddings and spec.path.startswith("embed.") else 0.0
        return min(1.0, tokens * self._chosen(spec))

    def _chosen(self, spec: ParamSpec) -> float:
        experts = self.config.experts
        return experts.chosen / experts.count if experts and "experts" in spec.axes else 1.0

    @staticmethod
    def _is_table(spec: ParamSpec) -> bool:
        return spec.path.startswith(("embed.", "positions."))
