"""What the front itself costs: tokens a second that one core turns from engine steps into server-sent events.

The engine is arithmetic and costs the front nothing; its steps carry a token for every stream, one message a step, as
in production. Each route is driven four ways: steps made in this process or come over gRPC, events counted in this
process or sent over TCP. The front has a core of its own, engine and client share the other one. What is reported is
CPU time of the front's process per token, user and system, which a busy machine disturbs least; one core's worth of
tokens a second is its inverse. The ceiling beside it: the same events encoded by orjson alone.

`python -m tests.bench.front [--streams 64] [--tokens 128] [--rounds 3] [--only grpc/tcp]`; one JSON line last.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import uvloop

from xlane.engine import EngineClient, Request
from xlane.engine.local import LocalClient
from xlane.engine.rpc_client import RpcClient
from xlane.engine.rpc_server import RpcServer
from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.tokenizer import TextTokenizer
from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.bench_client import Endpoint, exchange
from xlane.server.config import ServerConfig
from xlane.server.http import serve_http
from xlane.server.sockets import bind, port_of

from ..support.fake_core import FakeCore

ROUTES = ("/v1/chat/completions", "/generate_stream")
WAYS = ("local/asgi", "grpc/asgi", "local/tcp", "grpc/tcp")
TURN_S = 0.0005


def body_of(route: str, tokens: int, number: int) -> dict[str, Any]:
    """A request whose prompt differs from its neighbours'."""
    if route == "/generate_stream":
        return {"inputs": f"Number {number}", "parameters": {"max_new_tokens": tokens}}
    messages = [{"role": "user", "content": f"Number {number}"}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}


class Core(FakeCore):
    """An engine that takes any prompt and behaves."""

    def _validate(self, request: Request) -> None:
        pass

    def _misbehave(self, running: object) -> None:
        pass

    def cpu_s(self) -> float:
        """What its thread has used."""
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0))


def pin(core: int) -> None:
    """Stay on one core, where there are several."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


# --- the front's process


async def front(seam: str, streams: int) -> None:
    """Serve, and at each line of standard input `ROUTE TOKENS` (or `cpu`) answer with a line."""
    backend, config = Backend(), ServerConfig(max_concurrent_requests=4 * streams, port=0)
    tokenizer = TextTokenizer.from_path(demo_model(default_cache_dir()))
    tokenizer.eos_ids = ()  # no stream ends early
    core = Core(lanes=streams, turn_s=TURN_S) if seam == "local" else None
    engine: EngineClient = LocalClient(core) if core is not None else RpcClient(seam)

    def cpu_s() -> float:
        """The front's own: an engine in this process does not count."""
        return time.process_time() - (core.cpu_s() if core is not None else 0.0)

    backend.ready(engine, tokenizer, await engine.info())
    app, stop, listening = create_app(backend, config), asyncio.Event(), asyncio.Event()
    sock = bind(config)
    serving = asyncio.create_task(
        serve_http(app, config, backend=backend, stop=stop, listening=listening, sock=sock)
    )
    await listening.wait()
    print(port_of(sock), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if line.strip() == "cpu":
            print(cpu_s(), flush=True)
            continue
        route, tokens = line.split()
        start = cpu_s()
        await asyncio.gather(
            *(in_process(app, route, body_of(route, int(tokens), n)) for n in range(streams))
        )
        print(cpu_s() - start, flush=True)
    stop.set()
    await serving


async def in_process(app: Any, route: str, body: dict[str, Any]) -> None:
    """One request without a socket."""
    scope = {
        "type": "http", "method": "POST", "path": route, "raw_path": route.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": "", "asgi": {"version": "3.0"},
    }  # fmt: skip
    messages = [{"type": "http.request", "body": orjson.dumps(body), "more_body": False}]
    status = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()

    async def send(message: dict[str, Any]) -> None:
        status.append(message.get("status", 0))

    await app(scope, receive, send)
    assert status[0] == 200


# --- the other process: engine, client, and the sums


@asynccontextmanager
async def fronts(way: str, streams: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, Endpoint]]:
    """A front of this kind in a process of its own, and its engine in this one."""
    seam = way.split("/")[0]
    with tempfile.TemporaryDirectory() as directory:
        server = None
        if seam == "grpc":
            seam = f"unix:{directory}/engine"
            server = RpcServer(Core(lanes=streams, turn_s=TURN_S), seam)
            await server.start()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.front", "--front", seam, "--streams", str(streams),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        try:
            yield process, Endpoint.parse(f"http://127.0.0.1:{port}", None)
        finally:
            process.stdin.close()
            await process.wait()
            if server is not None:
                await server.stop()


async def ask(process: asyncio.subprocess.Process, line: str) -> float:
    """One line to the front, one number back."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line.encode() + b"\n")
    return float(await process.stdout.readline())


async def over_tcp(
    process: asyncio.subprocess.Process, endpoint: Endpoint, route: str, streams: int, tokens: int
) -> float:
    """CPU seconds of the front for these streams, read by a client here."""
    start = await ask(process, "cpu")
    requests = [endpoint.request(route, body_of(route, tokens, n)) for n in range(streams)]
    answers = await asyncio.gather(*(exchange(endpoint, request, 120.0) for request in requests))
    wrong = [answer.error for answer in answers if answer.error]
    assert not wrong, wrong[0]
    if route == "/generate_stream":  # the last event says which token it was
        assert {orjson.loads(answer.last_event)["index"] for answer in answers} == {tokens}
    return await ask(process, "cpu") - start


async def measure(way: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds per token of each round, for each route."""
    took: dict[str, list[float]] = {route: [] for route in ROUTES}
    async with fronts(way, args.streams) as (process, endpoint):
        for number in range(-1, args.rounds):  # the first is not counted
            for route in ROUTES:
                if way.endswith("tcp"):
                    used = await over_tcp(process, endpoint, route, args.streams, args.tokens)
                else:
                    used = await ask(process, f"{route} {args.tokens}")
                if number >= 0:
                    took[route].append(used / (args.streams * args.tokens) * 1e6)
    return took


def ceiling_us() -> float:
    """Microseconds to encode one event's JSON and nothing else: the least any front in this language pays."""
    delta = {"role": "assistant", "content": " word", "tool_calls": None}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    frame = {"id": "", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    start = time.process_time()
    for _ in range(100_000):
        orjson.dumps(frame)
    return (time.process_time() - start) * 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--front", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.front:
        pin(0)
        uvloop.run(front(args.front, args.streams))
        return
    pin(1)
    summary: dict[str, float] = {"ceiling_us": round(ceiling_us(), 2)}
    for way in [args.only] if args.only else WAYS:
        for route, each in uvloop.run(measure(way, args)).items():
            middle = statistics.median(each)
            rounds = ", ".join(f"{us:.1f}" for us in each)
            print(
                f"{way:>10} {route:<21} {middle:6.1f} µs a token, {1e6 / middle:8,.0f} tokens/s a core ({rounds})"
            )
            summary[f"{way} {route}"] = round(1e6 / middle)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
