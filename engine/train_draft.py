"""Training of draft heads by distillation: what the model thinks of texts is read once and kept, then heads learn to think ahead.

A head's guess is compared with what the model says when it gets there, so no answers are needed but the model's own. Knows
arrays; not where texts come from (`own_text`) nor how guesses are used.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..models.attention import XlaKernels
from ..models.draft_heads import Head, Heads
from ..models.kernels import PagedBatch
from .errors import PlanError
from .own_text import Text
from .pages import pages_for
from .state import abstract_kv, zeros_like
from .step import Blueprint, Params

READ_TOKENS = 512
"""Of one text, at most: what is behind them is not learnt from."""
LAUNCH_TOKENS = 4096
"""Of one launch that reads texts, where a small launch takes as long as a large one; on CPUs READ_TOKENS."""
TEXT_TOKENS = 32
"""A launch reads a text for each so many of its tokens: fewer long ones, or more short ones."""
INNER = 4
"""Width of a head's block, in hidden sizes."""
LEAST_BATCH, MOST_BATCH, EPOCH_STEPS = 256, 1024, 400
"""Positions of one training step: as many as leave an epoch so many steps, within bounds."""
LEARNING_RATE = 1e-3
HELD_OUT = 0.1
"""Share of the texts that heads are judged by, and never see."""
JUDGED = 4096
"""Most of their positions."""


@dataclass(frozen=True, slots=True)
class Course:
    """How heads are made."""

    heads: int = 3
    """Tokens to guess at a time."""
    candidates: int = 8192
    """Most tokens that can be guessed: the commonest."""
    epochs: int = 8


class Thoughts(NamedTuple):
    """What the model made of texts, one entry for each of N tokens."""

    hidden: np.ndarray
    """float16[N, D]: the last hidden state."""
    token: np.ndarray
    """int32[N]"""
    likeliest: np.ndarray
    """int32[N]: what it would say next."""
    text: np.ndarray
    """int32[N]: which text the token is of."""
    own: np.ndarray
    """bool[N]: said by the model, and not given."""

    def starts(self, ahead: int) -> np.ndarray:
        """Positions that are followed by at least so many tokens of the same text, all of the model's own."""
        return np.flatnonzero(
            (self.text[:-ahead] == self.text[ahead:]) & self.own[1 : len(self.own) + 1 - ahead]
        )


class Judged(NamedTuple):
    """How heads do on texts that they have not seen."""

    loss: float
    right: tuple[float, ...]
    """By head: how often it says what the model will say, the tokens before being right."""
    tokens_per_step: float
    """Of a greedy stream that takes every guess up to the first wrong one."""

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.0%}" for share in self.right)
        return f"loss {self.loss:.2f}, right {shares}, {self.tokens_per_step:.2f} tokens a step"


def read_texts(
    blueprint: Blueprint, params: Params, texts: Sequence[Text], progress: Callable[[int, int], None]
) -> Thoughts:
    """Run the model over texts of at most READ_TOKENS tokens each. `progress(done, total)` counts tokens."""
    b, place = blueprint, blueprint.placement
    width = b.shapes.page_tokens
    size = READ_TOKENS if place.device.platform == "cpu" else LAUNCH_TOKENS
    most = size // TEXT_TOKENS
    shapes = b.shapes._replace(pages=size // width + most)

    @partial(jax.jit, donate_argnums=1)
    def think(params: Params, kv, tokens: jax.Array, batch: PagedBatch):
        decoder = b.graph.merge(params[: len(b.graph.specs)])
        hidden, kv = decoder(tokens, batch, kv, b.kernels, place.constrain, one_token_rows=0)
        likeliest = jnp.argmax(decoder.logits(hidden, b.kernels), axis=1)
        return kv, place.everywhere((hidden.astype(jnp.float16), likeliest))

    kv = zeros_like(abstract_kv(b.config, shapes, b.kv_dtype, place))
    total = sum(len(text.tokens) for text in texts)
    parts: list[Thoughts] = []
    number = done = 0

    def keep(made: Thoughts) -> None:
        nonlocal done
        count = len(made.token)
        fetched = made._replace(
            hidden=np.asarray(made.hidden)[:count], likeliest=np.asarray(made.likeliest, np.int32)[:count]
        )
        parts.append(fetched)
        done += count
        progress(done, total)

    before: Thoughts | None = None
    for group in _groups([text.tokens for text in texts], most, size):
        tokens, rows, batch = _packed(group, width, most, size)
        kv, (hidden, likeliest) = think(params, kv, place.put(tokens), jax.tree.map(place.put, batch))
        count = sum(map(len, group))
        given = [text.given for text in texts[number : number + len(group)]]
        own = np.asarray(batch.positions) >= np.take(given, rows)
        if before is not None:  # fetched while the device is at the next
            keep(before)
        before = Thoughts(hidden, tokens[:count], likeliest, rows[:count] + number, own[:count])  # type: ignore[arg-type]
        number += len(group)
    if before is not None:
        keep(before)
    return Thoughts(*map(np.concatenate, zip(*parts)))


def _groups(texts: Sequence[Sequence[int]], most: int, size: int) -> Iterator[list[Sequence[int]]]:
    """Texts that are read in one launch: at most so many, of at most `size` tokens in all."""
    group: list[Sequence[int]] = []
    tokens = 0
    for text in texts:
        if group and (len(group) == most or tokens + len(text) > size):
            yield group
            group, tokens = [], 0
        group.append(text)
        tokens += len(text)
    if group:
        yield group


def _packed(
    group: Sequence[Sequence[int]], width: int, most: int, size: int
) -> tuple[np.ndarray, np.ndarray, PagedBatch]:
    """The tokens of texts behind each other, padded to `size`; the text that each is of; and where it stands."""
    tokens, rows = np.zeros((2, size), np.int32)
    positions = np.full(size, -1, np.int32)
    table = np.zeros((most, pages_for(READ_TOKENS, width)), np.int32)
    at = page = 0
    for row, text in enumerate(group):
        end, pages = at + len(text), pages_for(len(text), width)
        tokens[at:end], rows[at:], positions[at:end] = text, row, range(len(text))
        table[row, :pages] = range(page, page + pages)
        at, page = end, page + pages
    return tokens, rows, PagedBatch(positions, rows, table)  # type: ignore[arg-type]


class Trainer:
    """Heads in the making."""

    def __init__(self, blueprint: Blueprint, params: Params, thoughts: Thoughts, course: Course) -> None:
        """Candidates are chosen, and texts held out, at once. Raises PlanError if that leaves nothing to learn from."""
        self._ahead = np.arange(course.heads + 1)[None]
        starts = thoughts.starts(course.heads)
        texts = thoughts.text[-1] + 1
        held_out = thoughts.text[starts] >= texts - max(1, round(texts * HELD_OUT))
        rng = np.random.default_rng(0)
        self._learnt, unseen = starts[~held_out], starts[held_out]
        if not self._learnt.size or not unseen.size:
            raise PlanError(
                f"{len(thoughts.token)} tokens in {texts} texts are too few to learn from: give more"
            )
        self._judged = rng.permutation(unseen)[:JUDGED]
        self._batch = min(MOST_BATCH, max(LEAST_BATCH, self._learnt.size // EPOCH_STEPS))
        self._order = np.concatenate([rng.permutation(self._learnt) for _ in range(course.epochs)])
        counts = np.bincount(thoughts.likeliest[starts], minlength=blueprint.config.vocab_size)
        # Of those that never came, low ids first: most tokenizers number what is common before what is rare.
        tokens = np.sort(np.argsort(-counts, kind="stable")[: course.candidates])
        occurring, occurs = np.unique(thoughts.token, return_inverse=True)
        decoder = blueprint.graph.merge(params[: len(blueprint.graph.specs)])
        self._tables = _Tables(
            (decoder.head or decoder.embed)(jnp.array(tokens)).astype(jnp.float32),
            jnp.array(tokens, jnp.int32),
            decoder.embed(jnp.array(occurring)).astype(jnp.float32),
            jnp.array(thoughts.hidden),
            jnp.array(occurs, jnp.int32),
            jnp.array(thoughts.likeliest),
        )
        self.steps = max(1, len(self._order) // self._batch)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, LEARNING_RATE, min(50, self.steps // 10 + 1), self.steps
        )
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
        self._blocks: Any = _new_blocks(blueprint.config.hidden_size, course.heads)
        self._state: Any = self._optimizer.init(self._blocks)
        self._scale = blueprint.config.logits_scale
        self._learn = jax.jit(self._step, donate_argnums=(0, 1))
        self._look = jax.jit(self._loss)

    def train(self) -> Iterator[tuple[int, jax.Array]]:
        """Yields the steps done and the loss of the newest, as soon as it is under way."""
        size = self._batch
        for step in range(self.steps):
            chosen = np.resize(self._order[step * size : (step + 1) * size], size)
            self._blocks, self._state, loss = self._learn(self._blocks, self._state, self._tables, chosen)
            yield step + 1, loss

    def judge(self) -> Judged:
        """On the texts held out."""
        losses, rights = [], []
        for start in range(0, len(self._judged), self._batch):
            chosen = self._judged[start : start + self._batch]
            loss, right = self._look(self._blocks, self._tables, np.resize(chosen, self._batch))
            losses.append(float(loss))
            rights.append(np.asarray(right)[: len(chosen)])
        right = np.concatenate(rights)
        upto = np.cumprod(right, axis=1)
        before = np.concatenate([np.ones((len(right), 1)), upto[:, :-1]], axis=1)
        shares = upto.sum(axis=0) / np.maximum(before.sum(axis=0), 1)
        return Judged(float(np.mean(losses)), tuple(shares.tolist()), 1 + float(upto.sum(axis=1).mean()))

    @property
    def heads(self) -> Heads:
        """As they are now."""
        return Heads(self._tables.rows, self._blocks, self._tables.candidates)

    def _loss(
        self, blocks: tuple[Head, ...], tables: "_Tables", starts: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of the positions int32[n]: cross entropy with what the model says at each place, a head on average; which guesses are
        right, bool[n, K]."""
        kernels, count = XlaKernels("any"), len(tables.candidates)
        window = starts[:, None] + self._ahead
        hidden = tables.hidden[window].astype(jnp.float32)
        token, likeliest = tables.token[window[:, 1:]], tables.likeliest[window[:, 1:]]
        state, losses, rights = hidden[:, 0], [], []
        for ahead, block in enumerate(blocks):
            state = block.advance(state, tables.embedding[token[:, ahead]], INNER * hidden.shape[-1], kernels)
            logits = kernels.linear(state, tables.rows, count) * self._scale
            wanted = kernels.linear(hidden[:, ahead + 1], tables.rows, count) * self._scale
            losses.append(optax.softmax_cross_entropy(logits, jax.nn.softmax(wanted)).mean())
            rights.append(tables.candidates[jnp.argmax(logits, axis=1)] == likeliest[:, ahead])
        return jnp.stack(losses).mean(), jnp.stack(rights, axis=1)

    def _step(
        self, blocks: Any, state: Any, tables: "_Tables", starts: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        (loss, _), slope = jax.value_and_grad(self._loss, has_aux=True)(blocks, tables, starts)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its whole number of steps
            updates, state = self._optimizer.update(slope, state, blocks)
        return optax.apply_updates(blocks, updates), state, loss


class _Tables(NamedTuple):
    """What heads learn with, and does not change."""

    rows: jax.Array
    """float32[C, D]"""
    candidates: jax.Array
    """int32[C]"""
    embedding: jax.Array
    """float32[…, D]: of the tokens that occur."""
    hidden: jax.Array
    """float16[N, D]: as in Thoughts, and so are the next two."""
    token: jax.Array
    """int32[N]: as rows of `embedding`."""
    likeliest: jax.Array
    """int32[N]"""


def _new_blocks(width: int, count: int) -> tuple[Head, ...]:
    """Blocks that change nothing: their heads say what the decoder has just said."""
    inner = INNER * width
    ups = jax.random.normal(jax.random.key(0), (count, inner, 2 * width)) / jnp.sqrt(2.0 * width)
    return tuple(Head(up, jnp.zeros((width, inner))) for up in ups)
