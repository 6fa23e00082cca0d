"""Rotary positions in a config.json, as transformers 4 or 5 writes them. Knows the keys; what they mean to a frequency is
`models/rope.py`'s."""

import math

from ..config import DynamicRope, Llama3Rope, LongRope, RopeScaling, YarnRope
from ..errors import UnsupportedModel
from .hf import Fields

KINDS = "default, dynamic, linear, llama3, longrope, yarn"


class Rope:
    """`rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5), with the context they make."""

    def __init__(
        self, fields: Fields, default_theta: float, *, head_dim: int, width: int, max_positions: int
    ) -> None:
        """Args:
        width: dimensions of a head that rotate, of `head_dim`.
        max_positions: the context as config.json gives it.
        """
        self.theta = fields.number("rope_theta", default_theta)
        self.scaling: RopeScaling | None = None
        self.linear_factor = 1.0
        self.max_positions = max_positions
        self._head_dim, self._width = head_dim, width
        self._original = fields.optional_integer("original_max_position_embeddings")
        old, new = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
        if old and new:
            raise UnsupportedModel("config.json has both rope_scaling and rope_parameters; keep one of them")
        if rope := old or new:
            self._read(rope)

    def _read(self, rope: Fields) -> None:
        self.theta = rope.number("rope_theta", self.theta)
        fraction = rope.optional_number("partial_rotary_factor")
        if fraction is not None and int(self._head_dim * fraction) != self._width:
            raise rope.refusal(
                "partial_rotary_factor", fraction, f"{self._width} of {self._head_dim} dimensions rotate here"
            )
        kind = rope.text("type", "rope_type", default="default")
        match kind:
            case "default":
                pass
            case "linear":
                self.linear_factor = rope.number("factor")
            case "llama3":
                self.scaling = _llama3(rope)
            case "yarn":
                self.scaling = _yarn(rope, self._context(rope))
                self._stretch(self.scaling.original_max_position * self.scaling.factor)
            case "longrope" | "su":
                self.scaling = self._long(rope)
            case "dynamic":
                self.scaling = DynamicRope(
                    factor=rope.number("factor"), original_max_position=self.max_positions
                )
                self._stretch(self.max_positions * self.scaling.factor)
            case _:
                raise UnsupportedModel(
                    f"config.json: rope type {kind!r} is not supported (supported: {KINDS})"
                )
        rope.finish()

    def _context(self, rope: Fields) -> int:
        """The context before it was stretched."""
        return (
            rope.optional_integer("original_max_position_embeddings") or self._original or self.max_positions
        )

    def _stretch(self, context: float) -> None:
        self.max_positions = max(self.max_positions, int(context))

    def _long(self, rope: Fields) -> LongRope:
        original = self._context(rope)
        factor = rope.optional_number("factor") or 1.0
        # Beside the model's own context, the file's factor means nothing.
        factor = self.max_positions / original if original != self.max_positions else factor
        # Phi-MoE names what the others compute.
        short, long = rope.optional_number("short_mscale"), rope.optional_number("long_mscale")
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
        usual = rope.number("attention_factor", usual)
        return LongRope(
            short_factors=rope.numbers("short_factor", self._width // 2),
            long_factors=rope.numbers("long_factor", self._width // 2),
            original_max_position=original,
            attention_factor=short or usual,
            long_attention_factor=long or usual,
        )


def _llama3(rope: Fields) -> Llama3Rope:
    scaling = Llama3Rope(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UnsupportedModel("config.json: rope high_freq_factor must be larger than low_freq_factor")
    return scaling


def _yarn(rope: Fields, original: int) -> YarnRope:
    factor = rope.number("factor")
    mscale, all_dim = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")

    def usual(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = usual(mscale) / usual(all_dim) if mscale and all_dim else usual(1.0)
    return YarnRope(
        factor=factor,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        original_max_position=original,
        # The second is vLLM's, beside what the factor makes; transformers leaves it out.
        attention_factor=rope.number("attention_factor", attention_factor) * rope.number("attn_factor", 1.0),
        truncate=rope.flag("truncate", True),
    )
