"""`xlane bench serve`: load on any OpenAI-compatible, TGI or llama.cpp server, and what its users would feel.

Closed loop: N clients, each asks again when it has its answer; shows what the server can do. Open loop: requests at
random moments (Poisson) whatever the server does; shows what waiting feels like at that rate. Every prompt is of random
words and of exact length, every answer of exact length where the server can ignore end of text. One table, then one JSON
line. Knows HTTP bodies of three APIs; nothing of engines.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

from .bench_client import Answer, Endpoint, call, exchange
from .bench_report import Counts, Result, summarise, table
from .options import UsageError

REQUEST_TIMEOUT_S = 600.0
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to measure."""

    url: str
    api: str
    model: str | None = None
    prompt_tokens: int
    output_tokens: int
    concurrency: tuple[int, ...]
    rate: float | None = None
    requests: int | None = None
    warmup: int = 1
    shared_prefix: int = 0
    seed: int
    api_key: str | None = None
    json: bool = False


@dataclass(frozen=True, slots=True)
class Api:
    """How one kind of server is asked, and where it says what it did."""

    path: str
    body: Callable[[str, int, str], dict[str, Any]]
    """(prompt, output tokens, model) -> body"""
    counts: Counts
    tokenize: Callable[[str], dict[str, Any]]


APIS = {
    "openai": Api(
        "/v1/completions",
        lambda prompt, tokens, model: {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        },
        lambda last: (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]),
        # TGI's field, llama.cpp's and vLLM's: each server takes its own and ignores the others.
        lambda text: {"inputs": text, "content": text, "prompt": text, "add_special": True},
    ),
    "tgi": Api(
        "/generate_stream",
        lambda prompt, tokens, model: {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "details": True}},
        lambda last: (last["details"].get("input_length") or 0, last["details"]["generated_tokens"]),
        lambda text: {"inputs": text},
    ),
    "llama.cpp": Api(
        "/completion",
        lambda prompt, tokens, model: {
            "prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        },
        lambda last: (last["tokens_evaluated"], last["tokens_predicted"]),
        lambda text: {"content": text, "add_special": True},
    ),
}  # fmt: skip


class Prompts:
    """Makes prompts of random words that the server itself counts as exactly so many tokens."""

    def __init__(self, endpoint: Endpoint, api: Api, load: Load) -> None:
        self._endpoint, self._api, self._load = endpoint, api, load
        self._random = random.Random(load.seed)
        self._prefix = self._words(load.shared_prefix)
        self.exact = True
        """False if the server has no /tokenize: then a word counts as a token."""

    def _words(self, count: int) -> list[str]:
        return self._random.choices(WORDS, k=count)

    async def make(self) -> str:
        """One new prompt."""
        wanted = self._load.prompt_tokens
        words = [*self._prefix, *self._words(wanted - len(self._prefix))]
        for _ in range(8):
            count = await self._count(" ".join(words)) if self.exact else wanted
            # Words of the same mean length, but at least one: rounding must not stop us one step before the end.
            step = max(1, round(abs(count - wanted) * len(words) / max(1, count)))
            if count > wanted:
                del words[max(1, len(words) - step) :]
            elif count < wanted:
                words += self._words(step)
            else:
                break
        return " ".join(words)

    async def _count(self, text: str) -> int:
        try:
            reply = await call(self._endpoint, "/tokenize", self._api.tokenize(text))
            return len(reply["tokens"] if isinstance(reply, dict) else reply)
        except (ConnectionError, KeyError, TypeError, ValueError):
            self.exact = False
            return self._load.prompt_tokens


Send = Callable[[bytes], Awaitable[Answer]]


async def closed_loop(requests: Sequence[bytes], clients: int, send: Send) -> list[Answer]:
    """Each client takes the next request when it has its answer."""
    queue = iter(requests)

    async def client() -> list[Answer]:
        return [await send(request) for request in queue]

    return [
        answer for answers in await asyncio.gather(*(client() for _ in range(clients))) for answer in answers
    ]


async def open_loop(requests: Sequence[bytes], rate: float, seed: int, send: Send) -> list[Answer]:
    """Requests start at moments of a Poisson process, whatever became of earlier ones."""
    pauses = random.Random(seed)
    due = time.perf_counter()
    tasks: list[asyncio.Task[Answer]] = []
    for request in requests:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(send(request)))
        due += pauses.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def measure(load: Load, tell: Callable[[str], None]) -> list[Result]:
    """All runs of a load. Raises ConnectionError if the server cannot be used at all."""
    api = APIS[load.api]
    endpoint = Endpoint.parse(load.url, load.api_key)
    model = load.model or await _first_model(endpoint)
    prompts = Prompts(endpoint, api, load)

    async def requests(count: int) -> list[bytes]:
        texts = [await prompts.make() for _ in range(count)]
        return [endpoint.request(api.path, api.body(text, load.output_tokens, model)) for text in texts]

    async def send(request: bytes) -> Answer:
        return await exchange(endpoint, request, REQUEST_TIMEOUT_S)

    for request in await requests(load.warmup):
        answer = await send(request)
        if answer.error:
            raise ConnectionError(f"{load.url}{api.path}: {answer.error}")
    if not prompts.exact:
        tell(f"{load.url} has no /tokenize: prompts are {load.prompt_tokens} words, not tokens")
    if load.rate is not None:
        answers = await open_loop(await requests(load.requests or 64), load.rate, load.seed, send)
        return [summarise(answers, api.counts, None, load.rate)]
    results = []
    for clients in load.concurrency:
        answers = await closed_loop(await requests(load.requests or max(16, 4 * clients)), clients, send)
        results.append(summarise(answers, api.counts, clients, None))
    return results


async def _first_model(endpoint: Endpoint) -> str:
    try:
        return (await call(endpoint, "/v1/models"))["data"][0]["id"]
    except (ConnectionError, KeyError, IndexError, TypeError, ValueError):
        return "default"


def bench(options: Mapping[str, Any]) -> int:
    """Run the command; 3 if a request failed."""
    # A new seed each time, so that no prefix cache remembers the prompts of an earlier run.
    load = Load(**{"seed": time.time_ns() % 2**32, **options})
    if load.shared_prefix >= load.prompt_tokens:
        raise UsageError(
            f"--shared-prefix {load.shared_prefix} must be less than --prompt-tokens {load.prompt_tokens}"
        )
    try:
        results = uvloop.run(measure(load, lambda text: print(f"note: {text}", file=sys.stderr)))
    except (ConnectionError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if not load.json:
        print(
            f"{load.url}  {load.api}  {load.prompt_tokens} prompt / {load.output_tokens} output tokens; times in ms"
        )
        print(table(results))
    wanted = asdict(load)
    wanted.pop("api_key")
    wanted.pop("json")
    print(json.dumps({"load": wanted, "runs": [asdict(result) for result in results]}), flush=True)
    for result in results:
        if result.failed:
            print(
                f"error: {result.failed} of {result.requests} failed: {result.first_error}", file=sys.stderr
            )
    return 3 if any(result.failed for result in results) else 0
