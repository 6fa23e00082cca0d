"""What a load asks for: prompts of random words that the server itself counts as exactly so many tokens, or prompts and
lengths from a file. Knows the server's /tokenize; nothing of when requests are sent, nor of their answers.

A file holds JSON objects, one a line or all in one array, each of one of these forms:

    {"prompt_tokens": 900, "output_tokens": 80}        random words of that length
    {"prompt": "Why is …?", "output_tokens": 80}
    {"conversations": [{"value": "Why is …?"}, {"value": "Because …"}]}     ShareGPT's: the first turn is asked, and as
                                                       many tokens are wanted as the second has
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bench_api import Api
from .bench_client import Endpoint, call
from .options import UsageError

WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
]
"""Common words, so that most are one token of any English tokenizer."""

TRIES = 8
"""Of fitting a prompt to its length; what is still off after them is seen in the server's own count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one request is to be like."""

    prompt_tokens: int | None = None
    """Length of a prompt of random words; None: `prompt` is given."""
    output_tokens: int | None = None
    """None: as many as `answer` has."""
    prompt: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to ask, and how many tokens to ask for."""

    text: str
    output_tokens: int


def read_workload(path: str) -> tuple[Wanted, ...]:
    """The requests of a file, in its order. Raises UsageError that names the entry which is not understood."""
    try:
        text = Path(path).read_text()
        parsed = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--workload {path}: {error}") from None
    entries = tuple(_wanted(entry, f"--workload {path}, entry {n}") for n, entry in enumerate(parsed, 1))
    if not entries:
        raise UsageError(f"--workload {path} holds no request")
    return entries


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _wanted(entry: Any, where: str) -> Wanted:
    match entry:
        case {"prompt_tokens": int(prompt), "output_tokens": int(output)} if prompt > 0 and output > 0:
            return Wanted(prompt_tokens=prompt, output_tokens=output)
        case {"prompt": str(text), "output_tokens": int(output)} if text and output > 0:
            return Wanted(prompt=text, output_tokens=output)
        case {"conversations": [{"value": str(text)}, {"value": str(answer)}, *_]} if text and answer:
            return Wanted(prompt=text, answer=answer)
    raise UsageError(
        f"{where}: expected prompt_tokens and output_tokens (whole numbers of at least 1), prompt and "
        "output_tokens, or conversations of at least two turns with a value"
    )


def choose(entries: Sequence[Wanted], seed: int) -> Iterator[Wanted]:
    """Without end: all entries in random order, then all again in another."""
    order = random.Random(seed)
    while True:
        yield from order.sample(entries, len(entries))


class Prompts:
    """Makes prompts."""

    def __init__(self, endpoint: Endpoint, api: Api, shared_prefix: int, seed: int) -> None:
        """All prompts begin with the same `shared_prefix` tokens."""
        self._endpoint, self._api, self._prefix_tokens = endpoint, api, shared_prefix
        self._random = random.Random(seed)
        self._prefix: list[str] | None = None
        self.exact = True
        """False if the server has no /tokenize: then a word counts as a token."""

    async def make(self, wanted: Wanted) -> Prompt:
        """One new prompt."""
        if self._prefix is None:
            self._prefix = await self._fitted([], self._prefix_tokens) if self._prefix_tokens else []
        if wanted.prompt_tokens is None:
            text = " ".join([*self._prefix, wanted.prompt])
        else:
            text = " ".join(await self._fitted(self._prefix, wanted.prompt_tokens))
        return Prompt(text, wanted.output_tokens or max(1, await self._count(wanted.answer)))

    async def _fitted(self, start: list[str], wanted: int) -> list[str]:
        """`start` and random words after it, `wanted` tokens in all."""
        words = [*start, *self._words(max(1, wanted - len(start)))]
        for _ in range(TRIES):
            count = await self._count(" ".join(words)) if self.exact else len(words)
            # Words of the same mean length, but at least one: rounding must not stop us one step before the end.
            step = max(1, round(abs(count - wanted) * len(words) / max(1, count)))
            if count > wanted:
                del words[max(len(start) + 1, len(words) - step) :]
            elif count < wanted:
                words += self._words(step)
            else:
                break
        return words

    def _words(self, count: int) -> list[str]:
        return self._random.choices(WORDS, k=count)

    async def _count(self, text: str) -> int:
        if self.exact:
            try:
                reply = await call(self._endpoint, "/tokenize", self._api.tokenize(text))
                return len(reply["tokens"] if isinstance(reply, Mapping) else reply)
            except (ConnectionError, KeyError, TypeError, ValueError):
                self.exact = False
        return len(text.split())
