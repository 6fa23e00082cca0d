"""`xlane bench serve`: load on any OpenAI-compatible, TGI or llama.cpp server, and what its users would feel.

Closed loop: N clients, each asks again when it has its answer; shows what the server can do. Open loop: requests at
random moments (Poisson) whatever the server does; shows what waiting feels like at that rate. One table, then one JSON
line. Knows when to send; what is asked is `bench_prompts.py`, what it came to `bench_report.py`. Nothing of engines.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import uvloop

from .bench_api import APIS, merged
from .bench_client import Answer, Endpoint, call, exchange
from .bench_plot import check_plot, draw, panels_of
from .bench_prompts import Prompts, Wanted, choose, read_workload
from .bench_report import Result, Slo, line, summarise, table
from .console import Console
from .options import UsageError

REQUEST_TIMEOUT_S = 600.0
DEFAULT_TOKENS = 128
DEFAULT_CLIENTS = (1, 8)
DEFAULT_OPEN_REQUESTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to measure."""

    url: str
    api: str
    model: str | None = None
    workload: tuple[Wanted, ...]
    """Chosen from at random."""
    concurrency: tuple[int, ...] = ()
    """A run in closed loop for each."""
    rate: tuple[float, ...] = ()
    """A run in open loop for each: requests a second."""
    requests: int | None = None
    warmup: int = 1
    shared_prefix: int = 0
    slo: Slo | None = None
    extra_body: Mapping[str, Any]
    """Merged into every request."""
    seed: int
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, ready to be sent."""

    request: bytes
    output_tokens: int


Send = Callable[[Ask], Awaitable[Answer]]


async def closed_loop(asks: Sequence[Ask], clients: int, send: Send) -> list[Answer]:
    """Each client takes the next request when it has its answer."""
    queue = iter(asks)

    async def client() -> list[Answer]:
        return [await send(ask) for ask in queue]

    return [
        answer for answers in await asyncio.gather(*(client() for _ in range(clients))) for answer in answers
    ]


async def open_loop(asks: Sequence[Ask], rate: float, seed: int, send: Send) -> list[Answer]:
    """Requests start at moments of a Poisson process, whatever became of earlier ones. An answer's time counts from the
    moment its request was due, so that a busy load generator makes no server look quick."""
    pauses = random.Random(seed)
    due = time.perf_counter()
    tasks: list[asyncio.Task[Answer]] = []

    async def at(due: float, ask: Ask) -> Answer:
        answer = await send(ask)
        answer.sent_at = due
        return answer

    for ask in asks:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(at(due, ask)))
        due += pauses.expovariate(rate)
    return list(await asyncio.gather(*tasks))


Progress = Callable[[str, int, int], None]
"""Told the load of a run, how many of its requests are answered, and how many there are."""


def counted(send: Send, load: str, total: int, progress: Progress) -> Send:
    """The same, with each answer counted."""
    done = 0
    progress(load, done, total)

    async def send_and_count(ask: Ask) -> Answer:
        nonlocal done
        answer = await send(ask)
        done += 1
        progress(load, done, total)
        return answer

    return send_and_count


async def measure(
    load: Load, tell: Callable[[str], None], progress: Progress = lambda load, done, total: None
) -> list[Result]:
    """All runs of a load. Raises ConnectionError if the server cannot be used at all."""
    api = APIS[load.api]
    endpoint = Endpoint.parse(load.url, load.api_key)
    model = load.model or await _first_model(endpoint)
    prompts = Prompts(endpoint, api, load.shared_prefix, load.seed)
    workload = choose(load.workload, load.seed)

    async def asks(count: int) -> list[Ask]:
        made = [await prompts.make(next(workload)) for _ in range(count)]
        bodies = [merged(api.body(p.text, p.output_tokens, model), load.extra_body) for p in made]
        return [Ask(endpoint.request(api.path, body), p.output_tokens) for body, p in zip(bodies, made)]

    async def send(ask: Ask) -> Answer:
        answer = await exchange(endpoint, ask.request, REQUEST_TIMEOUT_S)
        answer.wanted_tokens = ask.output_tokens
        return answer

    for ask in await asks(load.warmup):
        answer = await send(ask)
        if answer.error:
            raise ConnectionError(f"{load.url}{api.path}: {answer.error}")
    results: list[Result] = []
    for rate in load.rate:
        made = await asks(load.requests or DEFAULT_OPEN_REQUESTS)
        count = counted(send, f"{rate:g}/s", len(made), progress)
        answers = await open_loop(made, rate, load.seed, count)
        results.append(summarise(answers, api.counts, rate=rate, slo=load.slo))
    for clients in load.concurrency:
        made = await asks(load.requests or max(16, 4 * clients))
        count = counted(send, f"{clients} clients", len(made), progress)
        answers = await closed_loop(made, clients, count)
        results.append(summarise(answers, api.counts, concurrency=clients, slo=load.slo))
    if not prompts.exact:
        tell(f"{load.url} has no /tokenize: a word of a prompt was taken for a token")
    return results


async def _first_model(endpoint: Endpoint) -> str:
    try:
        return (await call(endpoint, "/v1/models"))["data"][0]["id"]
    except (ConnectionError, KeyError, IndexError, TypeError, ValueError):
        return "default"


def load_of(options: Mapping[str, Any]) -> Load:
    """What the command's options ask for. Raises UsageError for what contradicts itself."""
    given = dict(options)
    file, prompt, output = (given.pop(name, None) for name in ("workload", "prompt_tokens", "output_tokens"))
    if file is None:
        workload = (Wanted(prompt_tokens=prompt or DEFAULT_TOKENS, output_tokens=output or DEFAULT_TOKENS),)
    elif prompt or output:
        raise UsageError("--workload has its own lengths: leave --prompt-tokens and --output-tokens out")
    else:
        workload = read_workload(file)
    shortest = min((w.prompt_tokens for w in workload if w.prompt_tokens), default=None)
    prefix = given.get("shared_prefix", 0)
    if shortest is not None and prefix >= shortest:
        raise UsageError(f"--shared-prefix {prefix} must be less than the shortest prompt, {shortest} tokens")
    if given.get("rate") and given.get("concurrency"):
        raise UsageError(
            "give --rate or --concurrency, not both: requests come at their own times, or when clients are free"
        )
    if not given.get("rate"):
        given.setdefault("concurrency", DEFAULT_CLIENTS)
    slo, extra_body = given.pop("slo", ()), given.pop("extra_body", "{}")
    # A new seed each time, so that no prefix cache remembers the prompts of an earlier run.
    seed = given.pop("seed", None)
    return Load(
        **given,
        workload=workload,
        slo=Slo.parse(slo) if slo else None,
        extra_body=_extra_body(extra_body),
        seed=time.time_ns() % 2**32 if seed is None else seed,
    )


def _extra_body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--extra-body {text}: {error}") from None
    if not isinstance(body, dict):
        raise UsageError(f"--extra-body {text}: expected a JSON object")
    return body


def bench(options: Mapping[str, Any]) -> int:
    """Run the command; 3 if a request failed."""
    given = dict(options)
    plot, json_only = given.pop("plot", None), given.pop("json", False)
    load = load_of(given)
    if plot is not None:
        check_plot(plot)
    # Plain lines: a bar that is drawn again and again would be in the way of what is measured.
    console = Console(sys.stderr, live=False)
    try:
        results = uvloop.run(
            measure(load, lambda text: print(f"note: {text}", file=sys.stderr), console.progress)
        )
    except (ConnectionError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if not json_only:
        print(f"{load.url}  {load.api}; times in ms")
        print(table(results))
    if plot is not None:
        what = "clients" if load.concurrency else "requests a second"
        loads = [f"{run.concurrency or run.rate:g}" for run in results]
        draw(plot, f"{load.model or load.api} at {load.url}", what, loads, panels_of(results))
    print(line(_told(load, options), results), flush=True)
    for result in results:
        if result.short:
            print(
                f"note: {result.load}: {result.short} answers are shorter than was asked for", file=sys.stderr
            )
        if result.failed:
            why = ", ".join(f"{count} × {kind}" for kind, count in result.errors.items())
            print(
                f"error: {result.load}: {result.failed} of {result.requests} failed ({why}); the first: "
                f"{result.first_error}",
                file=sys.stderr,
            )
    return 3 if any(result.failed for result in results) else 0


def _told(load: Load, options: Mapping[str, Any]) -> dict[str, Any]:
    """The load as the JSON line repeats it: all that is needed to run it again, but no key and no long list."""
    told = asdict(replace(load, workload=(), api_key=None)) | {"workload": options.get("workload")}
    del told["api_key"]
    if told["workload"] is None:
        wanted = load.workload[0]
        told |= {"prompt_tokens": wanted.prompt_tokens, "output_tokens": wanted.output_tokens}
    return told
