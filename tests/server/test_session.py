"""A server run from start to stop, in a process of its own: what it says, what survives, how it ends."""

import io
import json
import os
import queue
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from xlane.engine import EngineConfig
from xlane.server import session
from xlane.server.config import ServerConfig
from xlane.server.console import Console
from xlane.server.flags import RunConfig

from ..support.canaries import eventually
from ..support.fake_session import fake_model

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


class RunningServer:
    """The process and all it says."""

    def __init__(self, command: list[str], within: Sequence[str] = ()) -> None:
        """`within`: a command that runs another one."""
        self.process = subprocess.Popen(
            [*within, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=ROOT,
        )  # fmt: skip
        self.said: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def until(self, word: str) -> dict[str, Any]:
        """Read on until a line holds `word`; its fields."""
        give_up = time.monotonic() + PATIENCE_S
        while (line := self._lines.get(timeout=max(0.0, give_up - time.monotonic()))) is not None:
            self.said.append(line)
            if word in line:
                return json.loads(line)["fields"] if line.startswith("{") else {}
        raise AssertionError(f"ended without saying {word}: {self.said}")

    def ready(self) -> "RunningServer":
        self.url = self.until("Connected")["url"]
        return self

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(pid) for pid in children if b"fake_core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return pid

    def stream(self, tokens: int, each: Callable[[int], None] = lambda number: None) -> str:
        """The text of a streamed completion; `each` is called with the number of the event."""
        body = {
            "prompt": "w1 w2 w3",
            "max_tokens": tokens,
            "seed": 7,
            "ignore_eos": True,
            "stream": True,
        }
        text = ""
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
            assert answer.status_code == 200
            for number, line in enumerate(line for line in answer.iter_lines() if line.startswith("data: {")):
                text += json.loads(line[6:])["choices"][0]["text"]
                each(number)
        return text


Start = Callable[..., RunningServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[RunningServer] = []

    def begin(
        turn_s: float = 0.002,
        command: list[str] | None = None,
        grace_s: float = 20,
        within: Sequence[str] = (),
        engine: str = "",
    ) -> RunningServer:
        model = str(fake_model(tmp_path / "model"))
        fake = [sys.executable, "-m", "tests.support.fake_session", model, str(turn_s), str(grace_s), engine]
        running.append(RunningServer(command or fake, within))
        return running[-1]

    yield begin
    for server in running:
        server.process.kill()
        server.process.wait()


def xlane(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "xlane.server", "serve", *arguments]


def test_from_start_to_stop(start: Start):
    server = start().ready()
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert len(server.stream(5).split("w")) == 1 + 5
    assert any('"message": "serving"' in line for line in server.said)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=chat)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "template_error"), (
        "it has no template"
    )
    pid = server.engine_pid()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_S) == 0
    assert not Path(f"/proc/{pid}").exists()


def test_a_killed_engine_costs_no_token(start: Start):
    server = start(turn_s=0.01).ready()
    whole = server.stream(60)

    def kill(number: int) -> None:
        if number == 10:
            os.kill(server.engine_pid(), signal.SIGKILL)

    assert server.stream(60, kill) == whole
    assert "died: killed by SIGKILL" in server.until("died")["message"]
    server.until("the engine is back")


def test_a_stop_lets_running_requests_end(start: Start):
    server = start(turn_s=0.01).ready()

    def stop(number: int) -> None:
        if number in (2, 5):
            server.process.send_signal(signal.SIGHUP if number == 2 else signal.SIGINT)

    assert len(server.stream(100, stop).split("w")) == 1 + 100
    server.until("keys and certificates are read when they change")  # all that SIGHUP does
    assert server.process.wait(PATIENCE_S) == 0


ALONE = ["unshare", "--fork", "--pid", "--kill-child"]


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], check=False).returncode != 0,
    reason="this user may not make a namespace of processes",
)
def test_it_may_be_the_first_process_as_in_a_container(start: Start):
    server = start(turn_s=0.01, within=ALONE).ready()
    (first,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()

    def stop(number: int) -> None:
        if number == 5:
            os.kill(int(first), signal.SIGTERM)

    assert len(server.stream(50, stop).split("w")) == 1 + 50
    assert server.process.wait(PATIENCE_S) == 0


def test_a_terminal_that_is_closed_ends_what_was_started_in_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session.sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(session.sys.stdin, "isatty", lambda: True)
    out = io.StringIO()
    begun = session.Session(EngineConfig(model_id="m"), ServerConfig(), RunConfig(), Console(out))
    # The kernel takes the terminal away before it says so.
    monkeypatch.setattr(session.sys.stdin, "isatty", lambda: False)
    begun.hang_up()
    assert "stopping: running requests may end" in out.getvalue()


def test_what_does_not_end_in_time_is_told_so_and_the_exit_is_in_order(start: Start):
    server = start(turn_s=0.02, grace_s=0.5).ready()
    body = {"prompt": "w1", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        events = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(events)
        server.process.send_signal(signal.SIGTERM)
        *_, last, done = events
    assert done == "data: [DONE]"
    assert json.loads(last[6:])["error"]["code"] == "incomplete_generation"
    assert server.process.wait(PATIENCE_S) == 0


def engine_that_comes_once(folder: Path, then: str) -> str:
    """A script that runs the fake engine the first time, and `then` from then on."""
    script = folder / "engine.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "begun = pathlib.Path(__file__).with_suffix('.begun')\n"
        f"if begun.exists(): {then}\n"
        "begun.touch()\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'tests.support.fake_core', *sys.argv[1:]])\n"
    )
    return str(script)


def last_event_after_the_engine(server: RunningServer, then: Callable[[], None] = lambda: None) -> Any:
    """What a stream ends with whose engine is killed and does not come back; `then` is called after that."""
    body = {"prompt": "w1", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        events = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(events)
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.until("died: killed by SIGKILL")
        then()
        *_, last, done = events
    assert done == "data: [DONE]"
    return json.loads(last[6:])


def test_who_waits_for_an_engine_when_the_time_to_drain_is_over_is_told(start: Start, tmp_path: Path):
    server = start(0.02, grace_s=0.5, engine=engine_that_comes_once(tmp_path, "time.sleep(600)")).ready()
    last = last_event_after_the_engine(server, lambda: server.process.send_signal(signal.SIGTERM))
    assert last["error"]["code"] == "engine_lost"
    assert server.process.wait(PATIENCE_S) == 0


def test_who_waits_for_an_engine_is_told_when_none_comes_any_more(start: Start, tmp_path: Path):
    server = start(
        0.02, grace_s=300, engine=engine_that_comes_once(tmp_path, "sys.exit('no device')")
    ).ready()
    assert last_event_after_the_engine(server)["error"]["code"] == "engine_lost"
    began = time.monotonic()
    assert server.process.wait(PATIENCE_S) == 1
    assert time.monotonic() - began < 10, "not the time to drain"


def test_a_second_signal_does_not_wait(start: Start):
    server = start(turn_s=0.05).ready()
    failed: list[Exception] = []

    def read() -> None:
        try:
            server.stream(2000)
        except (httpx.HTTPError, KeyError) as error:  # cut off, or told so
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    server.until("stopping")
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    server.process.wait(PATIENCE_S)
    assert time.monotonic() - began < 10, "20 s are given to running requests, but not after a second signal"
    reader.join(PATIENCE_S)


@pytest.mark.parametrize(("files", "served", "told"), [(64, 8, "503"), (30, 1, "")], ids=["few", "none left"])
def test_more_connections_than_files_are_refused_and_then_all_is_well(
    start: Start, files: int, served: int, told: str
):
    """Where there are too few even for the server's own needs, connections are closed without a word."""
    server = start(within=["prlimit", f"--nofile={files}:{files}"]).ready()
    port = int(server.url.rsplit(":", 1)[1])
    with ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(60)]
        answers = [status_of(one) for one in crowd]
        print(answers)
        assert answers[:served] == ["200"] * served
        assert set(answers[20:]) == {told}
    health = f"{server.url}/health"
    eventually(lambda: getattr(try_get(health), "status_code", 0) == 200, "it has noticed that they left")
    assert len(server.stream(5).split("w")) == 1 + 5


def status_of(one: socket.socket) -> str:
    """Of what is answered to a request; empty if it was closed instead."""
    try:
        one.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        return one.recv(100)[9:12].decode()
    except ConnectionError:
        return ""


def memory_kb(pid: int, what: str) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1])


def test_where_memory_ends_a_crowd_of_large_bodies_is_turned_away_and_streams_go_on(start: Start):
    """800 MB are sent to a process that may have 450 MB more than it has; the default bounds keep it from needing them."""
    server = start(turn_s=0.01).ready()
    whole, pid = server.stream(100), server.process.pid
    before_kb = memory_kb(pid, "VmRSS")
    most = 1024 * memory_kb(pid, "VmData") + 450_000_000
    resource.prlimit(pid, resource.RLIMIT_DATA, (most, most))
    port = int(server.url.rsplit(":", 1)[1])
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2000000\r\n\r\n"
    answers: list[bytes] = []
    texts: list[str] = []

    def flood() -> None:
        with ExitStack() as stack:
            waiting = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(400)
            ]
            for one in waiting:
                one.sendall(head + b" " * 1_990_000)

            def refused() -> int:
                readable, _, _ = select.select(waiting, [], [], 0)
                for one in readable:
                    waiting.remove(one)
                    answers.append(one.recv(12))
                return len(answers)

            # Of 2 MB each, 128 fit into 256 MB: what came of those that were refused counted until they were.
            eventually(lambda: refused() >= 400 - 128, "all that do not fit are refused", PATIENCE_S)
            texts.append(server.stream(100))

    crowd = threading.Thread(target=flood)
    crowd.start()
    while crowd.is_alive():
        texts.append(server.stream(100))
    crowd.join()
    print(len(answers), before_kb, memory_kb(pid, "VmHWM"))
    assert set(texts) == {whole}
    assert len(answers) >= 400 - 128
    assert set(answers) == {b"HTTP/1.1 429"}
    assert httpx.get(f"{server.url}/health").status_code == 200


def scripted(tmp_path: Path, *changes: str) -> list[str]:
    """A command that runs a session whose engine never gets ready, with some lines run before; it prints its port."""
    stub = tmp_path / "slow.py"
    stub.write_text("import time; time.sleep(60)")
    script = tmp_path / "run.py"
    lines = (
        "import sys, time, uvloop",
        "from xlane.engine import EngineConfig",
        "from xlane.server import loaded, session",
        "from xlane.server.config import ServerConfig",
        "from xlane.server.console import Console",
        "from xlane.server.flags import RunConfig",
        "port_of = session.port_of",
        "session.port_of = lambda sock: print('port', port_of(sock), flush=True) or 1",
        *changes,
        f"engine, command = EngineConfig(model_id={str(fake_model(tmp_path / 'm'))!r}), [sys.executable, {str(stub)!r}]",
        "server = session.Session(engine, ServerConfig(port=0), RunConfig(), Console(), command)",
        "sys.exit(uvloop.run(server.run()))",
    )
    script.write_text("\n".join(lines))
    return [sys.executable, str(script)]


def test_the_port_answers_why_before_the_engine_is_there(start: Start, tmp_path: Path):
    server = start(command=scripted(tmp_path))
    server.until("port ")
    url = f"http://127.0.0.1:{server.said[-1].split()[1]}/health"
    answer = next(answer for answer in (try_get(url) for _ in range(500)) if answer is not None)
    assert answer.status_code == 503
    assert answer.json()["error"] in ("looking for the model", "the engine starts")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_S) == 0


def test_a_stop_does_not_wait_for_a_download(start: Start, tmp_path: Path):
    server = start(command=scripted(tmp_path, "loaded.find_model = lambda *_: time.sleep(300)"))
    server.until("port ")
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


def test_a_broken_tokenizer_is_told_of_before_the_engine_is_ready(start: Start, tmp_path: Path):
    breaks = (
        "import pathlib; pathlib.Path(sys.argv[0]).with_name('m').joinpath('tokenizer.json').write_text('[')"
    )
    server = start(command=scripted(tmp_path, breaks))
    server.until("TokenizerError")
    assert server.process.wait(20) == 1


def try_get(url: str) -> httpx.Response | None:
    try:
        return httpx.get(url)
    except httpx.TransportError:
        time.sleep(0.02)
        return None


def failure(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        xlane(*arguments), capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=ROOT
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


def test_a_model_that_is_not_there_is_code_3(tmp_path: Path):
    code, said = failure("--model-id", str(tmp_path / "none"), "--port", "0")
    assert code == 3
    assert said.startswith("error: ")
    assert "no such file or directory" in said


def test_a_port_that_is_taken_is_code_2(start: Start):
    server = start().ready()
    port = server.url.rsplit(":", 1)[1]
    code, said = failure("--port", port)
    assert code == 2
    assert (
        said
        == f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose --hostname and --port"
    )


def test_the_first_line_comes_at_once(start: Start, tmp_path: Path):
    began = time.monotonic()
    server = start(command=xlane("--model-id", str(tmp_path / "none"), "--port", "0"))
    server.until("starts with model")
    assert time.monotonic() - began < 10  # About 0.2 s alone; the machine may be busy.
