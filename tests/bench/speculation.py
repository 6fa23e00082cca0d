"""What guessing brings one greedy stream: servers that differ in their options alone, in turns, on copying work and open chat.

    python -m tests.bench.speculation [--rounds 3] [--options "" "--speculate 4"] [--tasks edit,summarise,json,chat]

Every server has answered every prompt once before it counts, so prompts are found in the prefix cache and the time is that of
decoding; all must give the same text. Output tokens a second through HTTP, medians of the rounds; what a step made, by the
server's own count; one JSON line last.
"""

import argparse
import json
import re
import statistics
import sys
import time
import urllib.request
from contextlib import ExitStack

from tests.bench.peers import free_port, server

NOTES = (
    "The library opens at nine on weekdays and at ten on Saturdays. Readers may borrow six books for three weeks, and "
    "extend each loan twice unless somebody else waits for the book. Newspapers, maps and the older volumes of the town's "
    "chronicle stay in the reading room. Children under twelve get a card of their own when a parent signs for it."
)
PEOPLE = (
    '[{"name": "Anna Keller", "age": 34, "job": "nurse", "city": "Bremen"}, {"name": "Boris Lang", "age": 51, '
    '"job": "teacher", "city": "Ulm"}, {"name": "Clara Vogt", "age": 28, "job": "baker", "city": "Jena"}]'
)
CODE = (
    "def total(prices, rate):\n    result = 0\n    for price in prices:\n        result += price * (1 + rate)\n"
    "    return result\n\n\ndef average(prices, rate):\n    return total(prices, rate) / len(prices)\n"
)
TASKS = {
    "edit": (
        f"Write this text again, word for word, with 'library' replaced by 'archive':\n\n{NOTES}",
        f"Write this code again with `rate` renamed to `tax`:\n\n{CODE}",
    ),
    "summarise": (
        f"Summarise this text in three sentences, in its own words:\n\n{NOTES}",
        f"List the most important sentences of this text:\n\n{NOTES}",
    ),
    "json": (
        f"Write this JSON again, indented:\n\n{PEOPLE}",
        f"Write this JSON again with Emma Roth, 39, judge, Trier added to it:\n\n{PEOPLE}",
    ),
    "chat": (
        "Why is the sky blue?",
        "How do I learn to play the guitar?",
        "Tell me a short story about a lighthouse.",
        "What should I see in Rome in two days?",
    ),
}


def ask(url: str, prompt: str, tokens: int) -> tuple[str, int, float]:
    """One answer: its text, its tokens, and how long it took in seconds."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
    }
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(asked, timeout=120) as answer:
        got = json.load(answer)
    took_s = time.perf_counter() - started
    return got["choices"][0]["message"]["content"], got["usage"]["completion_tokens"], took_s


def steps(url: str) -> tuple[float, float]:
    """A sequence's steps since the server's start, and the guesses that were right in them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    count, right = (
        float(match[1])
        if (match := re.search(rf"^tgi_request_skipped_tokens_{end}\S* (\S+)", text, re.M))
        else 0.0
        for end in ("count", "sum")
    )
    return count, right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", nargs="+", default=["", "--speculate 4"])
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--show", action="store_true", help="print the texts")
    args = parser.parse_args()
    tasks, limit = args.tasks.split(","), args.output_tokens
    rates: dict[str, dict[str, list[float]]] = {task: {how: [] for how in args.options} for task in tasks}
    made: dict[str, dict[str, float]] = {task: {} for task in tasks}
    with ExitStack() as running:
        urls = {}
        for how in args.options:
            command = [sys.executable, "-m", "xlane.server", "serve", "--kv-bytes", str(2**29), *how.split()]
            urls[how], _ = running.enter_context(server(command, free_port()))
        for task in tasks:
            for prompt in TASKS[task]:
                texts = {ask(url, prompt, limit)[0] for url in urls.values()}
                if len(texts) > 1:
                    print(f"{task}: texts differ: {sorted(texts)}", file=sys.stderr)
                if args.show:
                    print(f"--- {prompt}\n{texts.pop()}", file=sys.stderr)
        for _ in range(args.rounds):
            for task in tasks:
                for how, url in urls.items():
                    before = steps(url)
                    answers = [ask(url, prompt, limit) for prompt in TASKS[task]]
                    count, right = (now - then for now, then in zip(steps(url), before))
                    rates[task][how].append(sum(a[1] for a in answers) / sum(a[2] for a in answers))
                    made[task][how] = 1 + right / count
    print(f"{'':>10}" + "".join(f"{how or 'plain':>44}" for how in args.options))
    for task in tasks:
        first = statistics.median(rates[task][args.options[0]])
        cells = []
        for how, values in rates[task].items():
            rate = statistics.median(values)
            rounds = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{rate:6.1f} ({rounds}) x{rate / first:.2f} {made[task][how]:.2f}")
        print(f"{task:>10}" + "".join(f"{cell:>44}" for cell in cells))
    print(json.dumps({"tokens_per_s": rates, "tokens_per_step": made}))


if __name__ == "__main__":
    main()
