"""What the sampler should compute, written as naively as the definitions read: one row, float64, Python's own sort.

Knows nothing of lanes, batches or bits. The independent witness of `engine/sampler.py`.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from xlane.engine import SamplingParams


def penalized(
    logits: Sequence[float], s: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Repetition over prompt and output, then frequency and presence over the output alone."""
    result = [float(x) for x in logits]
    for token in {*prompt, *output}:
        positive = result[token] > 0
        result[token] = (
            result[token] / s.repetition_penalty if positive else result[token] * s.repetition_penalty
        )
    for token in set(output):
        result[token] -= s.frequency_penalty * list(output).count(token) + s.presence_penalty
    return result


def biased(logits: Sequence[float], s: SamplingParams) -> list[float]:
    """Each bias added to its token."""
    bias = dict(s.logit_bias)
    return [float(x) + bias.get(token, 0.0) for token, x in enumerate(logits)]


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities; minus infinity is 0."""
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [weight / sum(weights) for weight in weights]


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Log-probabilities; minus infinity stays so."""
    largest = max(logits)
    total = math.log(sum(math.exp(x - largest) for x in logits))
    return [x - largest - total for x in logits]


def kept(logits: Sequence[float], keep: Sequence[bool]) -> list[float]:
    """Minus infinity where it is not kept."""
    return [x if k else -math.inf for x, k in zip(logits, keep)]


def top_k(logits: Sequence[float], k: int) -> list[float]:
    """The k largest and what ties with the last of them."""
    last = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    return kept(logits, [x >= last for x in logits])


def top_p(logits: Sequence[float], p: float) -> list[float]:
    """The likeliest until their mass reaches p, and what ties with the last of them."""
    last = _last_of_mass([(x, prob) for x, prob in zip(logits, softmax(logits))], p)
    return kept(logits, [x >= last for x in logits])


def min_p(logits: Sequence[float], p: float) -> list[float]:
    """What is at least p times as likely as the likeliest."""
    largest = max(logits)
    return kept(logits, [math.exp(x - largest) >= p for x in logits])


def typical_p(logits: Sequence[float], p: float) -> list[float]:
    """Those whose surprise is nearest the entropy, until their mass reaches p."""
    probs = softmax(logits)
    entropy = -sum(prob * math.log(prob) for prob in probs if prob > 0)
    nearness = [-abs(-math.log(prob) - entropy) if prob > 0 else -math.inf for prob in probs]
    last = _last_of_mass(list(zip(nearness, probs)), p)
    return kept(logits, [x >= last for x in nearness])


def _last_of_mass(scored: list[tuple[float, float]], p: float) -> float:
    """Best first, the score at which the mass reaches p; the lowest if it never does."""
    mass = 0.0
    for score, weight in sorted(scored, reverse=True):
        mass += weight
        if mass >= p:
            return score
    return min(score for score, _ in scored)


def green(previous: int, vocab: int, gamma: float) -> list[bool]:
    """The green list after a token: MurmurHash3's finaliser over a Weyl sequence that starts at the token before."""
    start = finalised(previous ^ 15_485_863)
    hashes = [finalised((start + token * 0x9E3779B9) % 2**32) for token in range(vocab)]
    return [hashed / 2**32 < gamma for hashed in hashes]


def finalised(x: int) -> int:
    """fmix32 of MurmurHash3."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def marked(logits: Sequence[float], previous: int, gamma: float = 0.5, delta: float = 2.0) -> list[float]:
    """The green tokens raised."""
    return [x + delta * is_green for x, is_green in zip(logits, green(previous, len(logits), gamma))]


def watermark_z(text: Sequence[int], vocab: int, gamma: float = 0.5) -> float:
    """How many standard deviations the green tokens of a text are above plain text's (Kirchenbauer et al. 2023, eq. 3)."""
    pairs = list(itertools.pairwise(text))
    found = sum(green(previous, vocab, gamma)[token] for previous, token in pairs)
    return (found - gamma * len(pairs)) / math.sqrt(len(pairs) * gamma * (1 - gamma))


def processed(
    logits: Sequence[float], s: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> list[float]:
    """The logits a token is drawn from: every transform, in the order of the engine."""
    result = biased(logits, s)
    if s.watermark:
        result = marked(result, [*prompt, *output][-1])
    result = penalized(result, s, prompt, output)
    if len(output) < s.min_tokens:
        result = kept(result, [token not in s.stop_ids for token in range(len(result))])
    if s.temperature == 0:
        return result
    result = [x / s.temperature for x in result]
    if s.top_k > 0:
        result = top_k(result, s.top_k)
    if s.top_p < 1:
        result = top_p(result, s.top_p)
    if s.min_p > 0:
        result = min_p(result, s.min_p)
    if s.typical_p < 1:
        result = typical_p(result, s.typical_p)
    return result


def seen(vocab: int, prompt: Sequence[int], output: Sequence[int]) -> np.ndarray:
    """int32[V]: the engine's record of what occurred, spelt out."""
    row = np.zeros(vocab, np.int32)
    for token in prompt:
        row[token] = 1 << 20
    for token in output:
        row[token] += 1
    return row
