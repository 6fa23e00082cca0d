"""Logits to tokens, per lane, inside the step: a pure function of arrays. Knows no lane numbers and no requests.

Order: logit bias -> watermark -> repetition, frequency and presence penalty -> no stop id before `min_tokens` ->
grammar mask -> temperature -> top-k -> top-p -> min-p -> typical -> Gumbel-max. Biases come first (OpenAI's definition,
vLLM's order); what is greedy takes the largest after the mask.
No sort: every cut is a threshold found by bisection over the bits of a float (`threshold`). Work that no row asked for
is skipped by `lax.cond`. The randomness of a token is a function of (request seed, position) alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..models.rowwise import argmax
from .request import MAX_TOP_LOGPROBS
from .watermark import Watermark, mark

IN_PROMPT = 1 << 20
"""Bit of a `seen` entry: the token occurs in the prompt. The bits below count its occurrences in the output."""

LOGPROBS_RAW = 1
LOGPROBS_PROCESSED = 2

EXCLUDED = -jnp.inf


class SamplingRows(NamedTuple):
    """Sampling parameters of R rows. Meanings as in `request.SamplingParams`; all are arrays of length R."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition: jax.Array
    frequency: jax.Array
    presence: jax.Array
    seed: jax.Array
    """uint32[R, 2]"""
    logprobs: jax.Array
    """int32[R]: 0 none, LOGPROBS_RAW or LOGPROBS_PROCESSED."""
    top_n: jax.Array
    """int32[R]: alternatives to report."""
    bias_ids: jax.Array
    """int32[R, MAX_LOGIT_BIAS]: where `bias` goes; any id of the vocabulary where that is 0."""
    bias: jax.Array
    """float32[R, MAX_LOGIT_BIAS]"""
    stop: jax.Array
    """int32[R, MAX_STOP_IDS]: token ids that end the row; -1 for none."""
    stop_from: jax.Array
    """int32[R]: the first position at which a stop id may be chosen."""
    watermark: jax.Array
    """int32[R]: 1 to mark the choice."""


class Sampled(NamedTuple):
    """What was chosen for R rows."""

    token: jax.Array
    """int32[R]"""
    broken: jax.Array
    """bool[R]: the logits held a NaN; the token means nothing."""
    logprob: jax.Array
    """float32[R]; 0 where not asked for."""
    top_ids: jax.Array
    """int32[R, MAX_TOP_LOGPROBS]; meaningful up to each row's `top_n`."""
    top_logprobs: jax.Array
    """float32[R, MAX_TOP_LOGPROBS]"""


class Layout(Protocol):
    """How logits lie on several devices. What needs one sum or maximum per row is done on pieces of the vocabulary; what
    needs dozens is done on whole rows, each on one device."""

    def by_vocab(self, logits: jax.Array) -> jax.Array:
        """Split over the vocabulary."""
        ...

    def by_rows(self, logits: jax.Array) -> jax.Array:
        """Split over the rows."""
        ...

    def everywhere(self, tree: Any) -> Any:
        """These small arrays whole on every device."""
        ...


class OneDevice:
    """The `Layout` that has nothing to do."""

    def by_vocab(self, logits: jax.Array) -> jax.Array:
        """As they are."""
        return logits

    by_rows = by_vocab

    def everywhere(self, tree: Any) -> Any:
        """As it is."""
        return tree


ONE_DEVICE = OneDevice()


def sample(
    logits: jax.Array,
    rows: SamplingRows,
    seen: jax.Array,
    lanes: jax.Array,
    position: jax.Array,
    previous: jax.Array,
    watermark: Watermark,
    layout: Layout = ONE_DEVICE,
    mask: jax.Array | None = None,
    argmax: Callable[[jax.Array], jax.Array] = argmax,
) -> Sampled:
    """Choose one token per row.

    logits float32[R, V] · seen int32[B, V] with `lanes` int32[R] its rows (read only if a penalty is on); B marks a row
    nobody uses, which gets any token · position int32[R] of the token to be chosen · previous int32[R], the token before ·
    mask int32[R, mask_width(V)], see `exclude`; None masks no row · argmax: as `rowwise.argmax` does.
    """
    # Each step is pinned: what works by rows must spread neither to its neighbours nor to the weights.
    logits = layout.by_vocab(logits)
    rows = layout.everywhere(_neutral(rows, lanes >= seen.shape[0]))
    context = Context(seen, lanes, position, previous, watermark, mask)

    def greedily() -> Sampled:
        token = layout.everywhere(argmax(logits))
        return layout.everywhere(Sampled(*_unbroken(token, logits.shape[1]), *_nothing(token.shape[0])))

    # One condition before all of it, whose results are small: each condition that returns logits copies them, and a
    # device may have to ask the host at each.
    return jax.lax.cond(
        _asks(rows, context), lambda: _in_full(logits, rows, context, layout, argmax), greedily
    )


def _in_full(
    logits: jax.Array,
    rows: SamplingRows,
    context: "Context",
    layout: Layout,
    argmax: Callable[[jax.Array], jax.Array],
) -> Sampled:
    """Every kind of work that some row asked for."""
    processed = layout.by_vocab(adjust(logits, rows, context))
    random = rows.temperature > 0
    processed = jax.lax.cond(random.any(), lambda x: scale(x, rows.temperature), lambda x: x, processed)
    processed = layout.by_vocab(processed)
    filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0) | (rows.typical_p < 1)
    processed = jax.lax.cond(
        (filtered & random).any(),
        lambda x: layout.by_vocab(cut(layout.by_rows(x), rows)),
        lambda x: x,
        processed,
    )
    processed = layout.by_vocab(processed)
    noisy = jax.lax.cond(
        random.any(),
        lambda x: jnp.where(random[:, None], x + gumbel(rows.seed, context.position, x.shape[1]), x),
        lambda x: x,
        processed,
    )
    token, broken = _unbroken(layout.everywhere(argmax(layout.by_vocab(noisy))), logits.shape[1])
    return layout.everywhere(Sampled(token, broken, *report(logits, processed, token, rows, layout)))


def _unbroken(token: jax.Array, vocab: int) -> tuple[jax.Array, jax.Array]:
    """`argmax`'s answer as a token of the vocabulary, and whether it was none."""
    broken = token == vocab
    return jnp.where(broken, 0, token), broken


def _neutral(rows: SamplingRows, unused: jax.Array) -> SamplingRows:
    """Unused rows hold what another request, or nobody, left there: it must not make the batch do work."""
    return rows._replace(
        temperature=jnp.where(unused, 0.0, rows.temperature),
        repetition=jnp.where(unused, 1.0, rows.repetition),
        frequency=jnp.where(unused, 0.0, rows.frequency),
        presence=jnp.where(unused, 0.0, rows.presence),
        bias=jnp.where(unused[:, None], 0.0, rows.bias),
        stop_from=jnp.where(unused, 0, rows.stop_from),
        watermark=jnp.where(unused, 0, rows.watermark),
        logprobs=jnp.where(unused, 0, rows.logprobs),
        top_n=jnp.where(unused, 0, rows.top_n),
    )


class Context(NamedTuple):
    """Where R rows stand; see `sample`."""

    seen: jax.Array
    lanes: jax.Array
    position: jax.Array
    previous: jax.Array
    watermark: Watermark
    mask: jax.Array | None = None


def _biased(rows: SamplingRows) -> jax.Array:
    return (rows.bias != 0).any()


def _penalised(rows: SamplingRows) -> jax.Array:
    return ((rows.repetition != 1) | (rows.frequency != 0) | (rows.presence != 0)).any()


def _masked(context: Context) -> jax.Array:
    return (context.mask[:, 0] != 0).any() if context.mask is not None else jnp.array(False)


def _asks(rows: SamplingRows, c: Context) -> jax.Array:
    """bool: does any row want more than the likeliest token?"""
    of_rows = (
        (rows.temperature > 0) | (rows.watermark > 0) | (c.position < rows.stop_from) | (rows.logprobs > 0)
    )
    return of_rows.any() | _biased(rows) | _penalised(rows) | _masked(c)


def adjust(logits: jax.Array, rows: SamplingRows, context: Context) -> jax.Array:
    """What changes the likeliest token, too: what greedy rows take their pick from."""
    c, mask = context, context.mask
    marked = rows.watermark > 0
    early = c.position < rows.stop_from

    def when(wanted: jax.Array, transform: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        return jax.lax.cond(wanted, transform, lambda x: x, x)

    def apply(x: jax.Array) -> jax.Array:
        x = when(_biased(rows), lambda x: add_bias(x, rows), x)
        x = when(marked.any(), lambda x: mark(x, c.previous, marked, c.watermark), x)
        x = when(_penalised(rows), lambda x: penalize(x, rows, c.seen.at[c.lanes].get(mode="clip")), x)
        x = when(early.any(), lambda x: bar_stops(x, rows.stop, early), x)
        if mask is not None:
            x = when(_masked(c), partial(exclude, mask=mask), x)
        return x

    wanted = _biased(rows) | marked.any() | _penalised(rows) | early.any() | _masked(c)
    return when(wanted, apply, logits)


def add_bias(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Add each row's biases to the logits of their tokens (OpenAI's `logit_bias`)."""
    row = jax.lax.broadcasted_iota(jnp.int32, rows.bias_ids.shape, 0)
    return logits.at[row, rows.bias_ids].add(rows.bias, mode="drop")


def bar_stops(logits: jax.Array, stop: jax.Array, early: jax.Array) -> jax.Array:
    """Exclude the stop ids of the rows that are `early` bool[R]; but a row that has nothing else left may stop."""
    row = jax.lax.broadcasted_iota(jnp.int32, stop.shape, 0)
    # Out of range, an id is dropped; a negative one would count from the end.
    barred = jnp.where(early[:, None] & (stop >= 0), stop, logits.shape[1])
    rest = logits.at[row, barred].set(EXCLUDED, mode="drop")
    return jnp.where((rest > EXCLUDED).any(axis=1, keepdims=True), rest, logits)


def penalize(logits: jax.Array, rows: SamplingRows, seen: jax.Array) -> jax.Array:
    """Lower what occurred before. seen int32[R, V].

    Repetition (Keskar et al. 2019) looks at prompt and output; frequency and presence (OpenAI) at the output alone.
    """
    count = (seen & (IN_PROMPT - 1)).astype(jnp.float32)
    repetition = rows.repetition[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen > 0, scaled, logits)
    return logits - rows.frequency[:, None] * count - rows.presence[:, None] * (count > 0).astype(jnp.float32)


def mask_width(vocab: int) -> int:
    """Columns of a row's mask: whether it is masked, and a bit for each token."""
    return 1 + -(-vocab // 32)


def exclude(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Leave the tokens whose bit is set, in the rows that are masked. mask int32[R, mask_width(V)]: column 0 is not 0
    where the row is masked; bit n of column 1 + w is token 32 w + n."""
    count, vocab = logits.shape
    places = jnp.arange(32, dtype=jnp.int32)[None, None]
    allowed = (mask[:, 1:, None] >> places & 1).reshape(count, -1)[:, :vocab]
    return jnp.where((allowed == 1) | (mask[:, :1] == 0), logits, EXCLUDED)


def scale(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Divide by the temperature, where there is one. The likeliest is put at 0 first, so that however small the
    temperature is, nothing but the unlikely becomes infinite."""
    random = (temperature > 0)[:, None]
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / jnp.where(random, temperature[:, None], 1.0)
    return jnp.where(random, scaled, logits)


def cut(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Exclude tokens by top-k, then top-p, min-p and typical-p, each on what the one before left over.

    Tokens that tie with the last one kept are kept too.
    """
    random = rows.temperature > 0
    logits = _cond(random & (rows.top_k > 0), _top_k, logits, rows.top_k)
    logits = _cond(random & (rows.top_p < 1), _top_p, logits, rows.top_p)
    logits = _cond(random & (rows.min_p > 0), _min_p, logits, rows.min_p)
    return _cond(random & (rows.typical_p < 1), _typical_p, logits, rows.typical_p)


def _cond(wanted: jax.Array, transform, logits: jax.Array, parameter: jax.Array) -> jax.Array:
    """Apply to the rows that want it; skip the work if none does."""
    return jax.lax.cond(
        wanted.any(), lambda x: jnp.where(wanted[:, None], transform(x, parameter), x), lambda x: x, logits
    )


def _top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    keys = ordered_bits(logits)
    bound = threshold(keys, jnp.ones_like(logits), jnp.clip(k, 1, logits.shape[1]).astype(jnp.float32))
    return jnp.where(keys >= bound[:, None], logits, EXCLUDED)


def _top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    keys = ordered_bits(logits)
    bound = threshold(keys, jax.nn.softmax(logits, axis=-1), p)
    return jnp.where(keys >= bound[:, None], logits, EXCLUDED)


def _min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    likeliest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits - likeliest >= jnp.log(p)[:, None], logits, EXCLUDED)


def _typical_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Meister et al. 2022: keep the tokens whose surprise is nearest the entropy."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logprobs)
    surprise = jnp.where(probs > 0, -logprobs, 0.0)
    entropy = (probs * surprise).sum(axis=-1, keepdims=True)
    distance = jnp.where(probs > 0, jnp.abs(surprise - entropy), jnp.inf)
    keys = ~ordered_bits(distance)
    bound = threshold(keys, probs, p)
    return jnp.where(keys >= bound[:, None], logits, EXCLUDED)


def ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 of the same order (no NaN); both zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def threshold(keys: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t for which the weights of all keys >= t reach the target, by bisection over the 32 bits of t.

    keys uint32[R, V], weights float32[R, V], target float32[R] -> uint32[R]. If the whole row falls short (rounding),
    t is 0 and everything is kept. After an idea in T5X's decoding.
    """

    def body(step: jax.Array, bound: jax.Array) -> jax.Array:
        trial = bound | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        reached = jnp.where(keys >= trial[:, None], weights, 0.0).sum(axis=-1) >= target
        return jnp.where(reached, trial, bound)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(keys.shape[0], jnp.uint32))


def gumbel(seed: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    """float32[R, vocab] of noise; adding it and taking the largest draws from softmax. seed uint32[R, 2]."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    return jax.vmap(row)(seed, position)


def report(
    raw: jax.Array, processed: jax.Array, token: jax.Array, rows: SamplingRows, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the chosen token, and the likeliest alternatives, for the rows that ask."""
    count = raw.shape[0]

    def compute() -> tuple[jax.Array, jax.Array, jax.Array]:
        source = layout.by_rows(jnp.where((rows.logprobs == LOGPROBS_PROCESSED)[:, None], processed, raw))
        logprobs = jax.nn.log_softmax(source, axis=-1)
        chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
        return layout.everywhere((chosen, *top(logprobs, rows.top_n.max())))

    return jax.lax.cond((rows.logprobs > 0).any(), compute, lambda: _nothing(count))


def _nothing(count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A report for `count` rows of which none asks."""
    return (
        jnp.zeros(count, jnp.float32),
        jnp.zeros((count, MAX_TOP_LOGPROBS), jnp.int32),
        jnp.zeros((count, MAX_TOP_LOGPROBS), jnp.float32),
    )


def top(x: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The n largest of each row, best first, by n passes (n is small and mostly 0). float32[R, V] -> ids, values."""
    count = x.shape[0]
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)

    def body(index: jax.Array, carry):
        left, ids, values = carry
        best = argmax(left)
        value = jnp.take_along_axis(x, best[:, None], axis=1)
        ids = jax.lax.dynamic_update_slice(ids, best[:, None], (0, index))
        values = jax.lax.dynamic_update_slice(values, value, (0, index))
        return jnp.where(places == best[:, None], jnp.finfo(jnp.float32).min, left), ids, values

    # Excluded tokens are -inf: lift them above what marks a token as taken, so that each is reported once.
    left = jnp.maximum(x, -1e38)
    ids = jnp.zeros((count, MAX_TOP_LOGPROBS), jnp.int32)
    values = jnp.zeros((count, MAX_TOP_LOGPROBS), jnp.float32)
    _, ids, values = jax.lax.fori_loop(0, n, body, (left, ids, values))
    return ids, values
