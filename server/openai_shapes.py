"""The pieces OpenAI's answers are made of: usage, log-probabilities, model names. Builds values; knows no HTTP."""

import math
from collections.abc import Iterable
from typing import Any

from ..engine import TokenOutput
from .backend import Serving
from .generate import TextToken
from .headers import Clock, full_headers
from .openai_run import Finished, Job
from .text import TextTokenizer

NO_PROBABILITY = -9999.0
"""Stands for the logarithm of zero, which JSON has no number for."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def fingerprint(serving: Serving) -> str:
    """`system_fingerprint`: as TGI, the version and where it came from."""
    return f"{serving.info.version}-native"


def usage(job: Job, tokens: int, cached_tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    """`usage` of a request that has come so far. Each prompt counts once, every generated token counts, shown or not."""
    prompt = job.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def usage_of(finished: Finished) -> dict[str, Any]:
    """`usage` of a request that was not streamed."""
    answers, choices = finished.answers, finished.job.checked.choices
    # Later choices of a prompt find it in the cache because the first put it there; that is no saving to report.
    return usage(
        finished.job,
        sum(answer.done.tokens for answer in answers),
        sum(answer.done.cached_tokens for answer in answers[::choices]),
        sum(answer.reasoning_tokens for answer in answers),
    )


def answer_headers(finished: Finished, clock: Clock) -> dict[str, str]:
    """TGI's headers for a request that was not streamed."""
    job, answers = finished.job, finished.answers
    generated = sum(answer.done.tokens for answer in answers)
    timings = [answer.done.timing for answer in answers]
    return full_headers(job.serving, job.characters, clock, timings, job.prompt_tokens, generated)


def chat_logprobs(tokenizer: TextTokenizer, tokens: Iterable[TextToken]) -> dict[str, Any]:
    """`logprobs` of a chat choice or chunk."""
    content = [
        {
            **_entry(token_string(tokenizer, token), token.logprob),
            "top_logprobs": [_entry(tokenizer.token_text(i), logprob) for i, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: TextTokenizer, tokens: Iterable[TextToken]) -> dict[str, Any]:
    """`logprobs` of a completion choice or chunk. The alternatives include the token itself; scorers rely on it. The first
    token of a prompt, which nothing comes before, has null for both."""
    tokens = list(tokens)
    strings = [token_string(tokenizer, token) for token in tokens]
    return {
        "tokens": strings,
        "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else _likeliest(tokenizer, token, string)
            for token, string in zip(tokens, strings, strict=True)
        ],
        "text_offset": [token.start for token in tokens],
    }


def token_string(tokenizer: TextTokenizer, token: TextToken) -> str:
    """A token by itself; one that ends inside a character still has a string here."""
    return token.text or tokenizer.token_text(token.id)


def _entry(string: str, logprob: float | None) -> dict[str, Any]:
    # A replacement character stands for bytes that are no text by themselves, so their values are not known here.
    known = REPLACEMENT not in string
    return {
        "token": string,
        "logprob": _finite(logprob),
        "bytes": list(string.encode()) if known else None,
    }


def _likeliest(tokenizer: TextTokenizer, token: TextToken, string: str) -> dict[str, float]:
    """The alternatives by text, the token itself among them; of two that read the same the likelier."""
    found = {string: _finite(token.logprob)}
    for i, logprob in token.top:
        text = tokenizer.token_text(i)
        found[text] = max(_finite(logprob), found.get(text, -math.inf))
    return found


def prompt_logprobs(
    tokenizer: TextTokenizer, scored: Iterable[TokenOutput], alternatives: int
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as vLLM has it: null for the first token, then a dictionary by token id. A token's rank is told
    where it is known, among the alternatives."""
    return [None, *(_by_id(tokenizer, token, alternatives) for token in scored)]


def _by_id(tokenizer: TextTokenizer, token: TokenOutput, alternatives: int) -> dict[str, Any]:
    top = token.top[:alternatives]
    ranks = {i: rank for rank, (i, _) in enumerate(top, 1)}
    return {
        str(i): {"logprob": _finite(logprob), "rank": ranks.get(i), "decoded_token": tokenizer.token_text(i)}
        for i, logprob in (dict(top) | {token.id: token.logprob}).items()
    }


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else NO_PROBABILITY
