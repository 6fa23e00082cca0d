"""Draft heads: small networks that go on where a decoder stops, and say which tokens its next steps will probably choose.

Head k knows the decoder's last hidden state and the k tokens after it, its own guesses from the second on (Medusa, Cai et
al. 2024, made sequential as in Hydra, Ankner et al. 2024). Each adds a block to the state; the model's own output rows, of
the commonest tokens only, read a token off it. Knows arrays and one file; neither training nor lanes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from .checkpoint import SINGLE, SafetensorsSource
from .errors import CheckpointError
from .kernels import Kernels, Weight
from .modules import Style
from .spec import ParamSpec
from .weights import Weights, WeightSource, plain

FORMAT = "xlane-draft-heads.1"
TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class HeadsShape:
    """Sizes of a set of heads."""

    count: int
    """K, heads, that is, tokens guessed at a time."""
    hidden: int
    """D, of the decoder."""
    candidates: int
    """C, tokens that can be guessed."""
    inner: int
    """F, the width of a head's block."""

    def specs(self, style: Style) -> tuple[ParamSpec, ...]:
        """The weights: the output rows, then each head's two maps. A whole copy on every device, where they are packed in 8
        bits: a guess that rounding spoils costs less than reading all heads in full at each step."""
        shapes = [("rows", (self.candidates, self.hidden))]
        for head in range(self.count):
            up, down = f"heads.{head}.up", f"heads.{head}.down"
            shapes += [(up, (self.inner, 2 * self.hidden)), (down, (self.hidden, self.inner))]
        return tuple(
            ParamSpec(
                path, shape, style.dtype, (None, None), style.packed, quant="int8" if style.packed else None
            )
            for path, shape in shapes
        )


class Head(NamedTuple):
    """One head's block."""

    up: Weight
    """[F, 2D]"""
    down: Weight
    """[D, F]"""

    def advance(self, hidden: jax.Array, embedded: jax.Array, inner: int, kernels: Kernels) -> jax.Array:
        """The hidden state [R, D] a decoder had after one token more, about, whose embedding is given. `inner` is F."""
        inputs = jnp.concatenate([_normed(hidden), _normed(embedded)], axis=1)
        wide = jax.nn.silu(kernels.linear(inputs, self.up, inner))
        return hidden + kernels.linear(wide, self.down, hidden.shape[1])


class Heads(NamedTuple):
    """The parameters of a set of heads. A pytree."""

    rows: Weight
    """[C, D]: output rows."""
    blocks: tuple[Head, ...]
    tokens: jax.Array
    """int32[C]: the token each output row stands for."""

    @classmethod
    def of(cls, arrays: Sequence[Weight]) -> "Heads":
        """The weights in the order of `HeadsShape.specs`, and the tokens behind them."""
        rows, *blocks, tokens = arrays
        assert isinstance(tokens, jax.Array)
        return cls(rows, tuple(map(Head, blocks[::2], blocks[1::2])), tokens)

    def guess(
        self,
        hidden: jax.Array,
        token: jax.Array,
        embed: Callable[[jax.Array], jax.Array],
        inner: int,
        scale: float,
        kernels: Kernels,
    ) -> tuple[jax.Array, jax.Array]:
        """hidden [R, D], and the token int32[R] that was chosen after each -> what may follow that token, int32[R, K], and how
        likely it and all before it are what the model would say, float32[R, K]. `inner` is F, `scale` the model's of logits."""
        guesses: list[jax.Array] = []
        sure: list[jax.Array] = []
        for block in self.blocks:
            hidden = block.advance(hidden, embed(token), inner, kernels)
            logits = kernels.linear(hidden, self.rows, self.tokens.shape[0]).astype(jnp.float32) * scale
            token = self.tokens[jnp.argmax(logits, axis=1)]
            guesses.append(token)
            sure.append(jax.nn.softmax(logits, axis=1).max(axis=1))
        return jnp.stack(guesses, axis=1), jnp.cumprod(jnp.stack(sure, axis=1), axis=1)


def _normed(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=1, keepdims=True) + 1e-6)).astype(x.dtype)


@dataclass(frozen=True, slots=True)
class HeadsFile:
    """A file of heads, opened."""

    shape: HeadsShape
    tokens: np.ndarray
    """int32[C]"""
    source: WeightSource
    made_for: str
    """The fingerprint of the model."""
    model_id: str
    """What it was called when they were made."""


def save_heads(folder: Path, heads: Heads, made_for: str, model_id: str) -> None:
    """Write the heads into a folder, as float16. `heads` are plain arrays, as trained."""
    tensors = {"rows": heads.rows}
    for number, block in enumerate(heads.blocks):
        tensors |= {f"heads.{number}.{name}": weight for name, weight in block._asdict().items()}
    stored = {name: np.asarray(weight, np.float16) for name, weight in tensors.items()}
    about = {"format": FORMAT, "made_for": made_for, "model_id": model_id}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**stored, TOKENS: np.asarray(heads.tokens, np.int32)}, folder / SINGLE, about)


def open_heads(path: Path) -> HeadsFile:
    """Open what `save_heads` wrote, or the folder that it is in. Raises CheckpointError."""
    path = path / SINGLE if path.is_dir() else path
    source = SafetensorsSource([path])
    with safe_open(path, "numpy") as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} holds no draft heads of this version (format {about.get('format')!r}, not {FORMAT!r}): "
                "make them with xlane train-draft"
            )
        tokens = file.get_tensor(TOKENS)
    names = [name for name in source.names() if name != TOKENS]
    candidates, hidden = source.shape("rows")
    shape = HeadsShape(len(names) // 2, hidden, candidates, source.shape("heads.0.up")[0])
    weights = Weights(source, {name: plain(name) for name in names}, [TOKENS])
    weights.check(shape.specs(Style("float32", packed=False)))
    return HeadsFile(shape, tokens, weights, about["made_for"], about["model_id"])
