"""xlane and llama.cpp's server side by side, in turns, at equal precision, on the same prompts lengths, with one client.

    python -m tests.bench.peers --llama-server PATH --gguf F32.gguf [--concurrency 1,16] [--rounds 3]

Each round starts one server, warms it, runs every concurrency, stops it, and goes on to the other; the table shows the
median of the rounds. Prints one JSON line last. Bounded: a server that is not ready within two minutes ends the run.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

READY_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator[str]:
    """Run a server until it answers /health, and stop it at the end."""
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
    try:
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not become ready")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def load(url: str, api: str, args: argparse.Namespace, concurrency: int) -> dict:
    """One run of `xlane bench serve`; its JSON row."""
    command = [
        sys.executable, "-m", "xlane.server", "bench", "serve", "--url", url, "--api", api,
        "--prompt-tokens", str(args.prompt_tokens), "--output-tokens", str(args.output_tokens),
        "--concurrency", str(concurrency), "--requests", str(max(4, concurrency * args.per_client)),
        "--json",
    ]  # fmt: skip
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(answer.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--concurrency", default="1,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--per-client", type=int, default=2)
    args = parser.parse_args()
    concurrencies = [int(number) for number in args.concurrency.split(",")]
    llama = [
        args.llama_server,
        "-m",
        args.gguf,
        "-np",
        "16",
        "-c",
        str(16 * 512),
        "-t",
        "2",
        "--host",
        "127.0.0.1",
    ]
    servers = {
        "xlane": ([sys.executable, "-m", "xlane.server", "serve"], "openai"),
        "llama.cpp": (llama, "llama.cpp"),
    }
    results: dict[tuple[str, int], list[dict]] = {}
    for _ in range(args.rounds):
        for name, (command, api) in servers.items():
            with server(command, free_port()) as url:
                load(url, api, argparse.Namespace(**{**vars(args), "output_tokens": 8}), max(concurrencies))
                for concurrency in concurrencies:
                    row = load(url, api, args, concurrency)
                    results.setdefault((name, concurrency), []).append(row)
                    print(name, concurrency, json.dumps(row), file=sys.stderr, flush=True)
    summary = {}
    for (name, concurrency), rows in results.items():
        rate = statistics.median(_rate(row) for row in rows)
        summary[f"{name} at {concurrency}"] = rate
        print(
            f"{name:>10} at {concurrency:>3}: {rate:8.1f} output tokens/s (rounds: {[round(_rate(r), 1) for r in rows]})"
        )
    print(json.dumps(summary))


def _rate(row: dict) -> float:
    return row["runs"][0]["output_tokens_per_s"]


if __name__ == "__main__":
    main()
