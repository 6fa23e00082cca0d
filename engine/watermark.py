"""A watermark in the choice of tokens: a green list that the token before decides gets a little more weight.

After "A Watermark for Large Language Models" (Kirchenbauer et al. 2023, algorithm 2, the soft red list). The paper takes
the first `gamma` of a permutation of the vocabulary; here each token is green with probability `gamma` by a hash of its
own, so that nothing is permuted or sorted and a piece of the vocabulary needs no other. Who looks for the mark does the
same arithmetic: of T tokens of plain text about gamma T are green, of marked text more.

Knows logits and tokens; not who asked for it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HASH_KEY = 15_485_863
"""The key of the paper's code, and of TGI's."""
GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio: the step of the Weyl sequence."""


class Watermark(NamedTuple):
    """How strong the mark is."""

    gamma: float
    """Share of green tokens, above 0 and below 1."""
    delta: float
    """What is added to their logits."""


def green(previous: jax.Array, vocab: int, gamma: float) -> jax.Array:
    """int32[R] -> bool[R, V]: the green list after each token.

    A counter-based generator as SplitMix's (Steele et al. 2014) in 32 bits: token t is the counter, the token before and
    the key give the start, and MurmurHash3's finaliser (Appleby) mixes the sum.
    """
    start = _mixed(previous.astype(jnp.uint32) ^ jnp.uint32(HASH_KEY))
    counter = jax.lax.broadcasted_iota(jnp.uint32, (previous.shape[0], vocab), 1)
    return _mixed(start[:, None] + counter * jnp.uint32(GOLDEN)) < jnp.uint32(int(gamma * 2**32))


def mark(logits: jax.Array, previous: jax.Array, wanted: jax.Array, watermark: Watermark) -> jax.Array:
    """Raise the green tokens of the rows that are `wanted` bool[R]. logits float32[R, V], previous int32[R]."""
    raised = wanted[:, None] & green(previous, logits.shape[1], watermark.gamma)
    return logits + jnp.where(raised, jnp.float32(watermark.delta), 0.0)


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
