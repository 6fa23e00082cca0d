"""What a person sees of a start: who is starting, one display per phase, what was decided, where to click.

On a terminal a phase is a bar; piped it is a few plain lines; with JSON output each event is an object. Knows how to show
things, not what they mean; every line of the process goes through here, so that bars and lines do not cut each other.
"""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from .logs import json_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET_S = 5.0
"""Least seconds between two plain lines of one phase."""


class Console:
    """The output of one command. May be used from several threads."""

    def __init__(
        self, stream: TextIO | None = None, *, json_output: bool = False, live: bool | None = None
    ) -> None:
        """`live` shows bars; None shows them if `stream` is a terminal."""
        self._stream = sys.stdout if stream is None else stream
        self._json = json_output
        self._live = not json_output and (self._stream.isatty() if live is None else live)
        self._lock = threading.RLock()
        self._bars: Progress | None = None
        self._phases: dict[str, _Phase] = {}

    def line(self, text: str) -> None:
        """One finished line, above the bars."""
        with self._lock:
            if self._bars is not None:
                self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
                return
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                pass  # Nobody reads (any more), or the disk is full: serving goes on.

    def pass_on(self, text: str) -> None:
        """A line of another process; in JSON an entry's message, unless it is an entry itself."""
        if self._json and text and not text.startswith("{"):
            self.say(text)
        elif text or not self._json:
            self.line(text)

    def say(self, message: str, level: str = "INFO", fields: Mapping[str, object] | None = None) -> None:
        """A message with its facts: the facts are shown in JSON only, for people the message holds them."""
        if self._json:
            self.line(json_line(level, {"message": message, **(fields or {})}, "xlane"))
        else:
            self.line(message if level == "INFO" else f"{level.lower()}: {message}")

    def progress(
        self, phase: str, done: float, total: float | None, unit: str = "", detail: str = ""
    ) -> None:
        """How far a phase is. `unit` `B` is shown as megabytes a second; reaching `total` ends the phase."""
        with self._lock:
            finished = total is not None and done >= total
            entry = self._phases.get(phase)
            if entry is not None and entry.ended and finished:
                return
            new = entry is None or entry.ended  # An engine that is started again has its phases again.
            if entry is None or entry.ended:
                entry = self._phases[phase] = _Phase(phase, unit)
            entry.update(done, total, detail)
            entry.ended = finished
            if self._live:
                self._bar(entry)
            if entry.ended:
                self.say(entry.summary(), fields=entry.fields() | {"seconds": entry.seconds})
            elif self._json or not self._live:
                self._plain(entry, first=new)

    def _plain(self, entry: "_Phase", *, first: bool) -> None:
        now = time.monotonic()
        if first or now - entry.told >= QUIET_S:
            entry.told = now
            self.say(entry.state(), fields=entry.fields())

    def _bar(self, entry: "_Phase") -> None:
        if self._bars is None:
            self._bars = _rich_progress(self._stream)
            self._bars.start()
        if entry.task is None:
            entry.task = self._bars.add_task(entry.name, total=entry.total, detail="")
        self._bars.update(entry.task, total=entry.total, completed=entry.done, detail=entry.amount())
        if entry.ended:
            self._bars.remove_task(entry.task)
            if all(phase.ended for phase in self._phases.values()):
                self.settle()

    def settle(self) -> None:
        """Take the bars away, for good or until the next phase."""
        with self._lock:
            bars, self._bars = self._bars, None
            if bars is not None:
                bars.stop()
            for entry in self._phases.values():
                entry.task = None

    def table(self, title: str, rows: Sequence[tuple[str, object]]) -> None:
        """Names and values, aligned."""
        if self._json:
            self.say(title, fields={name.replace(" ", "_"): value for name, value in rows})
            return
        width = max((len(name) for name, _ in rows), default=0)
        self.line(title)
        for name, value in rows:
            self.line(f"  {name:<{width}}  {value}")

    def ready(self, url: str, seconds: float, model: str, *, key: bool = False) -> None:
        """The last word of a start: where it is, a page to open and a line to paste."""
        self.settle()
        facts = {"url": url, "seconds": round(seconds, 3), "model": model}
        self.say(f"ready in {seconds:.1f} s: {url}", fields=facts)
        if not self._json:
            self.line(
                f"\n  {url}/ui  to chat there, and to watch the lanes\n\n  {curl(url, model, key=key)}\n"
            )


class _Phase:
    """One phase's numbers."""

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit
        self.done, self.total, self.detail = 0.0, None, ""
        self.start = time.monotonic()
        self.first_done: float | None = None
        self.told = 0.0
        self.ended = False
        self.task: TaskID | None = None

    def update(self, done: float, total: float | None, detail: str) -> None:
        # What was there before (a resumed download, programs from a cache) must not count as speed.
        if self.first_done is None:
            self.first_done = done
        self.done, self.total, self.detail = done, total, detail

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 3)

    def amount(self) -> str:
        """`12/40` or `120/300 MB, 45 MB/s`."""
        if self.unit != "B":
            total = "" if self.total is None else f"/{self.total:g}"
            return f"{self.done:g}{total} {self.unit}".strip() + (f" ({self.detail})" if self.detail else "")
        total = "" if self.total is None else f"/{self.total / 1e6:,.0f}"
        gained = self.done - (self.first_done or 0)
        speed = f", {gained / self.seconds / 1e6:,.0f} MB/s" if self.seconds > 0.2 and gained else ""
        return f"{self.done / 1e6:,.0f}{total} MB{speed}" + (f" ({self.detail})" if self.detail else "")

    def fields(self) -> dict[str, object]:
        return {"phase": self.name, "done": self.done, "total": self.total}

    def state(self) -> str:
        return f"{self.name}: {self.amount()}"

    def summary(self) -> str:
        return f"{self.name}: {self.amount()} in {self.seconds:.1f} s"


def _rich_progress(stream: TextIO) -> "Progress":
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(compact=True),
    )
    return Progress(*columns, console=RichConsole(file=stream), transient=True, refresh_per_second=8)


def curl(url: str, model: str, *, key: bool) -> str:
    """A request to paste into a shell."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    secret = ' -H "Authorization: Bearer $API_KEY"' if key else ""
    return f"curl {url}/v1/chat/completions{secret} -H 'content-type: application/json' -d '{body}'"


def bytes_text(count: float) -> str:
    """`1.5 GB`, in powers of ten as disks and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def decisions(rows: Mapping[str, object]) -> list[tuple[str, object]]:
    """Rows of a table without those nobody decided."""
    return [(name, value) for name, value in rows.items() if value is not None]
