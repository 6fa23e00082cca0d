"""What a start looks like on a pipe, a terminal and as JSON, and where log records go."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xlane.server import logs
from xlane.server.console import Console, bytes_text, curl


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def quiet_root() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("xlane").setLevel(logging.NOTSET)


def start(console: Console) -> None:
    console.say("xlane 1")
    for done in range(101):
        console.progress("weights", done * 1e6, 100e6, "B")
    console.line("in between")
    for done in range(3):
        console.progress("programs", done, 2)
    console.table("plan", [("lanes", 8), ("kv pages", 100)])
    console.ready("http://h:1", 1.234, "demo", key=True)


def test_a_pipe_gets_few_plain_lines():
    out = io.StringIO()
    start(Console(out))
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["xlane 1", "weights: 0/100 MB", lines[2]]
    assert lines[2].startswith("weights: 100/100 MB")
    assert lines[3:5] == ["in between", "programs: 0/2"]
    assert lines[6:9] == ["plan", "  lanes     8", "  kv pages  100"]
    assert lines[9] == "ready in 1.2 s: http://h:1"
    assert lines[11].split()[0] == "http://h:1/ui"
    assert lines[13].strip() == curl("http://h:1", "demo", key=True)
    assert "\x1b" not in out.getvalue()


def test_json_is_one_object_a_line():
    out = io.StringIO()
    start(Console(out, json_output=True))
    entries = [json.loads(line) for line in out.getvalue().splitlines() if line != "in between"]
    assert {entry["level"] for entry in entries} == {"INFO"}
    assert entries[2]["fields"]["phase"] == "weights"
    assert entries[-1]["fields"] == {
        "message": "ready in 1.2 s: http://h:1", "url": "http://h:1", "seconds": 1.234, "model": "demo"
    }  # fmt: skip
    assert next(e["fields"] for e in entries if e["fields"]["message"] == "plan")["kv_pages"] == 100


def test_what_another_process_says_is_json_where_all_is():
    entry = logs.json_line("ERROR", {"message": "m"}, "t")
    out, plain = io.StringIO(), io.StringIO()
    for line in ("libtpu: a warning", "", entry):
        Console(out, json_output=True).pass_on(line)
        Console(plain).pass_on(line)
    told = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [each["fields"]["message"] for each in told] == ["libtpu: a warning", "m"]
    assert told[1] == json.loads(entry)
    assert plain.getvalue() == f"libtpu: a warning\n\n{entry}\n"


def test_a_terminal_gets_bars_and_lines_stay_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    start(Console(out))
    assert "\x1b[" in out.getvalue()
    assert "in between" in out.getvalue()
    assert "weights: 100/100 MB" in out.getvalue()


def test_a_phase_that_comes_again_is_shown_again():
    out = io.StringIO()
    console = Console(out)
    for _ in range(2):
        console.progress("programs", 0, 1)
        console.progress("programs", 1, 1)
        console.progress("programs", 1, 1)
    assert out.getvalue().count("programs: 1/1") == 2


def test_nobody_reading_is_no_error():
    out = io.StringIO()
    console = Console(out)
    out.close()
    console.line("anyone?")


def test_sizes():
    texts = [bytes_text(count) for count in (999, 1_500, 2.5e6, 98e9, 1.2e12, 999.6e6)]
    assert texts == ["999 B", "1.5 kB", "2.5 MB", "98 GB", "1.2 TB", "1 GB"]


@pytest.mark.usefixtures("quiet_root")
def test_log_records_become_lines():
    lines: list[str] = []
    logs.setup("info", lines.append, json_output=False)
    logs.setup("info", lines.append, json_output=False)  # Again is not twice.
    logging.getLogger("xlane.engine").info("one %d", 1)
    logging.getLogger("xlane.engine").debug("hidden")
    logging.getLogger("other").info("hidden")
    logging.getLogger("other").warning("shown")
    assert [line.split("Z ", 1)[1].strip() for line in lines] == [
        "INFO xlane.engine: one 1",
        "WARNING other: shown",
    ]


@pytest.mark.usefixtures("quiet_root")
def test_json_log_records():
    lines: list[str] = []
    logs.setup("debug", lines.append, json_output=True)
    try:
        raise ValueError("x\ny")
    except ValueError:
        logging.getLogger("xlane").exception("failed", extra={"fields": {"id": 3}})
    entry = json.loads(lines[0])
    assert "\n" not in lines[0]
    assert (entry["level"], entry["target"], entry["fields"]["message"]) == ("ERROR", "xlane", "failed")
    assert entry["fields"]["id"] == 3
    assert "ValueError" in entry["fields"]["exception"]


def no_reader() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def full_disk() -> io.TextIOWrapper:
    return Path("/dev/full").open("w")


@pytest.mark.parametrize("stream", [no_reader, full_disk])
def test_what_cannot_be_written_stops_nobody(stream: Callable[[], io.TextIOWrapper]):
    log = stream()
    with pytest.raises(OSError, match=r"Broken pipe|No space"):
        print("x", file=log, flush=True)
    console = Console(log, json_output=False, live=False)
    console.say("not written")
    console.say("nor this")
    with contextlib.suppress(OSError):
        log.close()
