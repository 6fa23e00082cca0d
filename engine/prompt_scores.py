"""Log-probabilities of a prompt's own tokens, a block of tokens at a time: the logits of a whole prompt are never there
at once. Inside the prefill program, behind one condition. Knows arrays; not whose prompt it is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .request import MAX_TOP_LOGPROBS
from .sampler import Layout, top

LEAST_ROWS = 32
"""Tokens of a block, if there are not more lanes: fewer would read the output head too often for what they use of it."""

SCORE_WIDTH = 1 + 2 * MAX_TOP_LOGPROBS
"""Columns of a scored token: log-probability, alternatives' ids, alternatives' log-probabilities."""


def block_rows(lanes: int) -> int:
    """Tokens of a block: as many as a decode step has rows, so that it needs no more memory than that does."""
    return max(lanes, LEAST_ROWS)


def prompt_scores(
    hidden: jax.Array,
    targets: jax.Array,
    alternatives: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    rows: int,
    layout: Layout,
) -> jax.Array:
    """hidden [T, D], targets int32[T] (the token that follows each; -1 where nobody asks), how many alternatives to
    report -> int32[T, SCORE_WIDTH], floats by their bits. `head` makes float32[rows, V] of logits from [rows, D]."""
    tokens = hidden.shape[0]
    rows = min(rows, tokens)
    wanted = targets >= 0
    nothing = jnp.zeros((tokens, SCORE_WIDTH), jnp.int32)

    def compute(hidden: jax.Array) -> jax.Array:
        hidden = layout.everywhere(hidden)

        def block(index: jax.Array, scores: jax.Array) -> jax.Array:
            at = jnp.minimum(index * rows, tokens - rows)  # the last block may take up some of the one before
            part = jax.lax.dynamic_slice_in_dim(hidden, at, rows)
            target = jax.lax.dynamic_slice_in_dim(targets, at, rows)
            made = layout.everywhere(_score(head(part), target, alternatives, layout))
            return jax.lax.dynamic_update_slice_in_dim(scores, made, at, 0)

        first, last = jnp.argmax(wanted), tokens - 1 - jnp.argmax(wanted[::-1])
        return jax.lax.fori_loop(first // rows, last // rows + 1, block, nothing)

    return jax.lax.cond(wanted.any(), compute, lambda hidden: nothing, hidden)


def _score(logits: jax.Array, target: jax.Array, alternatives: jax.Array, layout: Layout) -> jax.Array:
    """float32[R, V], int32[R] -> int32[R, SCORE_WIDTH]."""
    logprobs = jax.nn.log_softmax(layout.by_rows(layout.by_vocab(logits)), axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(target, 0)[:, None], axis=1)
    ids, values = top(logprobs, alternatives)
    bits = jax.lax.bitcast_convert_type(jnp.concatenate([chosen, values], axis=1), jnp.int32)
    return jnp.concatenate([bits[:, :1], ids, bits[:, 1:]], axis=1)
