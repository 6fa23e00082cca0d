"""Writes docs/reference/*.md from the options, metrics and errors there are: `python -m tests.deploy.reference`."""

import asyncio
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.support.fake_engine import FakeEngine
from xlane.engine.errors import EngineError, PlanError
from xlane.server.bounds import BOUNDS
from xlane.server.cli import COMMANDS
from xlane.server.errors import ServerError, problem_of
from xlane.server.flags import CONFIGS
from xlane.server.keys import Account, Limits, key_of
from xlane.server.metrics import Metrics, Now, certificate_family, text_of
from xlane.server.options import Flag, default_text

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"
MADE = "<!-- Made from the code by `python -m tests.deploy.reference`. -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
        + "\n"
    )


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def option_row(flag: Flag) -> list[str]:
    names = [f"-{flag.short}"] * bool(flag.short) + [f"--{name}" for name in flag.names]
    called = ", ".join(map(code, names)) + (f"<br>{code(flag.env)}" if flag.env else "")
    kind = " ".join(code(choice) for choice in flag.choices) or flag.kind
    return [called, kind, code(default_text(flag, CONFIGS)), flag.help]


def options() -> str:
    """Of `serve` all, of every other command what only it has."""
    parts = [
        MADE,
        "# Options\n",
        "Each can be typed (`--port 8080`), set as a variable (`PORT=8080`) or written into a file for `--config` (`port = 8080`). What is typed "
        "wins, then variables, then the file. `xlane config show --origin` prints every value with where it is from, in the form of such a file.\n",
    ]
    known: set[str] = set()
    head = ("Option and variable", "Value", "Default", "What it does")
    for command in COMMANDS:
        groups = {
            title: [flag for flag in group if flag.fate == "used"] for title, group in command.groups.items()
        }
        new = {title: [flag for flag in group if flag.name not in known] for title, group in groups.items()}
        parts.append(f"## xlane {command.name}\n\n{command.summary}\n")
        if command.name != "serve" and "Model" not in groups:
            parts.append(table(head, (option_row(flag) for group in groups.values() for flag in group)))
            continue
        if command.name != "serve":
            own = [flag for group in new.values() for flag in group]
            shared = any(flag.name in known for group in groups.values() for flag in group)
            parts += [table(head, map(option_row, own))] if own else []
            parts += [
                "Beside these, options of `xlane serve`.\n" if own else "Options of `xlane serve`.\n"
            ] * shared
            continue
        for title, group in new.items():
            parts += [f"### {title}\n", table(head, map(option_row, group))] if group else []
        known = {flag.name for group in groups.values() for flag in group}
        defaults = ((code(b.name), code(default_text(b, CONFIGS)), b.help) for b in BOUNDS)
        parts += [
            "### Limits of `--limit NAME=VALUE`\n",
            "In a file they are the table `[limit]`.\n",
            table(("Name", "Default", "What it bounds"), defaults),
        ]
    return "\n".join(parts)


def metric_rows() -> Iterator[list[str]]:
    """Every family that a server with keys and living engines elsewhere has."""
    engine = FakeEngine()
    account = Account(key_of("name", "secret", Limits()))
    now = Now(ready=True, in_flight=0, restarts=0, replays=0, accounts=(account,), engines={"serving": 1})
    families = Metrics().families(asyncio.run(engine.stats()), engine.info_value, now)
    text = text_of([*families, certificate_family(0.0)]).decode()
    for name, what in re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE):
        kind = re.search(rf"^# TYPE {name} (\w+)$", text, re.MULTILINE)
        samples = re.findall(rf"^{name}(?:_bucket)?{{(.*)}} ", text, re.MULTILINE)
        labels = {label for sample in samples for label in re.findall(r'(\w+)="', sample)} - {
            "le",
            "quantile",
        }
        yield [code(name), kind[1] if kind else "", ", ".join(map(code, sorted(labels))), what]


def metrics() -> str:
    return "\n".join([
        MADE,
        "# Metrics\n",
        "What `GET /metrics` says. How to read them, a dashboard and alerts: [Watching a server](../monitoring.md).\n",
        table(("Metric", "Kind", "Labels", "What it counts"), metric_rows()),
    ])  # fmt: skip


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for below in kind.__subclasses__():
        if below.__module__.startswith("xlane.") and below is not PlanError:  # raised at start only
            yield below
            yield from subclasses(below)


def error_rows() -> Iterator[list[str]]:
    for kind in (*subclasses(ServerError), *subclasses(EngineError)):
        problem = problem_of(kind("…"))
        error = problem.openai()["error"]
        tgi = f"{problem.row.tgi_status} {code(problem.tgi()['error_type'])}"
        retry = "yes" if problem.retry_after_s is not None else ""
        names = [error["type"], *([error["code"]] if error["code"] else [])]
        anthropic = problem.anthropic()["error"]["type"]
        what = (kind.__doc__ or "").split("\n")[0]
        yield [
            what,
            f"{problem.row.openai_status} {', '.join(map(code, names))}",
            code(anthropic),
            tgi,
            retry,
        ]


def errors() -> str:
    head = (
        "What is wrong",
        "OpenAI: status, type, code",
        "Anthropic: type",
        "TGI: status, error_type",
        "Retry-After",
    )
    return "\n".join([
        MADE,
        "# Errors\n",
        "Anthropic's routes have OpenAI's status. The message names the limit, the value and, where there is one, the option that moves it. "
        "Clients that heed `Retry-After` ask again by themselves. In a stream that has begun, an error is its last event.\n",
        table(head, error_rows()),
        "## Exit codes\n",
        table(("Code", "What ended"), (
            ("0", "what was asked for is done; a server: it was told to stop"),
            ("1", "a crash, ours or the engine's; `xlane doctor`: something keeps a server from starting"),
            ("2", "wrong usage: an option, a variable, a file, a port that is taken"),
            ("3", "the model or the plan cannot work here: the line says why and what to do"),
            ("130", "interrupted"),
        )),
    ])  # fmt: skip


PAGES = {"options.md": options, "metrics.md": metrics, "errors.md": errors}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
