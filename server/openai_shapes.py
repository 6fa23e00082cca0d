"""The pieces OpenAI's answers are made of: usage, log-probabilities, model names. Builds values; knows no HTTP."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .backend import Serving
from .generate import Done, TextToken
from .headers import Clock, full_headers
from .openai_run import Finished, Job
from .text import TextTokenizer

NO_PROBABILITY = -9999.0
"""Stands for the logarithm of zero, which JSON has no number for."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def fingerprint(serving: Serving) -> str:
    """`system_fingerprint`: as TGI, the version and where it came from."""
    return f"{serving.info.version}-native"


def usage(job: Job, ends: Mapping[int, Done], reasoning_tokens: int) -> dict[str, Any]:
    """`usage` of a finished request. Each prompt counts once, every generated token counts, shown or not."""
    prompt = job.prompt_tokens
    completion = sum(done.tokens for done in ends.values())
    # Later choices of a prompt find it in the cache because the first put it there; that is no saving to report.
    cached = sum(done.cached_tokens for i, done in ends.items() if i % job.checked.choices == 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def usage_of(finished: Finished) -> dict[str, Any]:
    """`usage` of a request that was not streamed."""
    answers = finished.answers
    ends = {i: answer.done for i, answer in enumerate(answers)}
    return usage(finished.job, ends, sum(answer.reasoning_tokens for answer in answers))


def answer_headers(finished: Finished, clock: Clock) -> dict[str, str]:
    """TGI's headers for a request that was not streamed."""
    job, answers = finished.job, finished.answers
    generated = sum(answer.done.tokens for answer in answers)
    timings = [answer.done.timing for answer in answers]
    return full_headers(job.serving, job.text, clock, timings, job.prompt_tokens, generated)


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
    """`logprobs` of a completion choice or chunk. The alternatives include the token itself; scorers rely on it."""
    tokens = list(tokens)
    strings = [token_string(tokenizer, token) for token in tokens]
    return {
        "tokens": strings,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {tokenizer.token_text(i): _finite(logprob) for i, logprob in token.top}
            | {string: _finite(token.logprob)}
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


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else NO_PROBABILITY
