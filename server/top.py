"""`xlane top`: the lanes of a running server in a terminal, as they work. Knows `/ui/lanes`; draws, and keeps the last look.

Of several models it shows the lanes of each that is loaded, and of each other one what becomes of it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .remote import Remote, RemoteError

if TYPE_CHECKING:
    from rich.console import RenderableType

OK, CRASH = 0, 1
Look = Mapping[str, Any]
BAR = 16
"""Characters of a lane's bar."""


@dataclass(frozen=True, slots=True)
class Looks:
    """All that a server told at one moment."""

    at_s: float
    engines: Mapping[str, Look]
    """By model; of a single one its name is not needed."""
    away: Mapping[str, str]
    """Models that are not loaded, and why."""


def top(options: Mapping[str, Any]) -> int:
    """Show until Ctrl-C; with `once` one look, for scripts. Raises UsageError; a server that is away ends a single look."""
    from rich.console import Console
    from rich.live import Live

    remote, pause_s = Remote(options["url"], options.get("api_key")), options["interval"]
    console = Console(highlight=False)
    if options.get("once"):
        try:
            console.print(page(look(remote), None))
        except RemoteError as error:
            console.print(f"error: {error}", markup=False)
            return CRASH
        return OK
    before = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                now = look(remote)
                live.update(page(now, before), refresh=True)
                before = now
            except RemoteError as error:
                live.update(str(error), refresh=True)
                before = None
            time.sleep(pause_s)


def look(remote: Remote) -> Looks:
    """Raises RemoteError."""
    at_s, told = time.monotonic(), remote.get("/v1/models")["data"]
    if "state" not in told[0]:
        return Looks(at_s, {"": remote.get("/ui/lanes")}, {})
    there = [model["id"] for model in told if model["state"] in ("loaded", "leaving")]
    away = {model["id"]: f"{model['state']}: {model['why']}" for model in told if model["id"] not in there}
    return Looks(at_s, {name: remote.get(f"/ui/lanes?model={quote(name, safe='')}") for name in there}, away)


def page(now: Looks, before: Looks | None) -> "RenderableType":
    """All that was told; `before` is the look before it, from which rates are made."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for name, engine in now.engines.items():
        past = None if before is None else before.engines.get(name)
        parts += [screen(engine, past, 0.0 if before is None else now.at_s - before.at_s), Text("")]
    return Group(*parts, *(Text(f"{name} · {why}", style="dim") for name, why in now.away.items()))


def screen(now: Look, before: Look | None, seconds: float) -> "RenderableType":
    """What one look at an engine shows; `before` is the look so many seconds ago, from which rates are made."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("LANE", "", "DOES"):
        table.add_column(title)
    for title in ("PROMPT", "CACHED", "OUTPUT", "PAGES", "AGE s"):
        table.add_column(title, justify="right")
    for lane in now["lanes"]:
        share = (lane["prompt_tokens"] + lane["generated_tokens"]) / lane["most_tokens"]
        does, color = "decode", "cyan"
        if lane["prefill"]:
            share = lane["computed_tokens"] / (lane["prompt_tokens"] + lane["generated_tokens"])
            does, color = f"prefill {share:.0%}", "yellow"
        numbers = ("prompt_tokens", "cached_tokens", "generated_tokens", "pages")
        table.add_row(
            str(lane["lane"]),
            Text("━" * round(BAR * share), style=color) + Text("━" * (BAR - round(BAR * share)), style="dim"),
            Text(does, style=color),
            *(f"{lane[name]:,}" for name in numbers),
            f"{lane['age_s']:.1f}",
        )
    return Group(Text(_served(now), style="bold"), Text(_figures(now, before, seconds)), Text(""), table)


def _served(now: Look) -> str:
    return f"{now['model']} · {now['device']} · {now['precision']}"


def _figures(now: Look, before: Look | None, seconds: float) -> str:
    held = now["pages_total"] - now["pages_free"]
    facts = [
        f"lanes {len(now['lanes'])}/{now['lanes_total']}",
        f"queue {now['queued']}",
        f"pages {held:,}/{now['pages_total']:,}",
    ]
    if before is not None and seconds > 0:
        for title, name in (("output", "decode_tokens"), ("prompts", "prefill_tokens")):
            facts.append(f"{title} {(now[name] - before[name]) / seconds:,.0f} tokens/s")
        for title in ("ttft", "itl"):
            count = now[title]["count"] - before[title]["count"]
            if count > 0:
                facts.append(
                    f"{title} {1e3 * (now[title]['sum_s'] - before[title]['sum_s']) / count:,.1f} ms"
                )
    return " · ".join(facts)
