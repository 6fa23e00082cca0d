"""The engine as a child process that is kept alive: the front's `Supervisor`, and the child's `ParentLink`.

A command line is started with `--uds PATH --progress-fd N` added. On the descriptor the child writes JSON lines:
`{"phase": "weights", "done": 1, "total": 9}` while it starts, `{"phase": "ready"}` when it serves, and, if it cannot
start, `{"phase": "error", "message": "why"}` before it exits with CANNOT_START. The same pipe tells the child that its
parent is gone. Knows processes and pipes; nothing of gRPC or of what the command computes.
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .errors import EngineLost, EngineStopped, PlanError

logger = logging.getLogger(__name__)

CANNOT_START = 3
"""Exit code of a child that would fail again: the model or the plan cannot work here."""
READY, ERROR = "ready", "error"
"""Phases with a meaning of their own."""
PIPES_TIMEOUT_S = 1.0
"""How long the last words of a dead child are waited for: a grandchild may hold its pipes open for ever."""
KEPT_EVENTS = 100
LOOK_S = 5.0
"""Pause between two questions to an engine that serves."""
MISSES = 6
"""Questions in a row without an answer after which it is killed. They are counted, not seconds: where the whole machine stood
still, one is lost."""
LINE_BYTES = 1 << 20
"""Longest line of a child's output that is kept whole."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a child's start has come."""

    phase: str
    done: int = 0
    total: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class ProcessEvent:
    """Something that happened to a child, for logs and metrics."""

    kind: str
    """`started`, `ready`, `died`, `gave_up` or `stopped`."""
    pid: int
    detail: str
    time: float
    """Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a dead child is started again. One that had been ready is at once."""

    first_delay_s: float = 0.5
    """Pause after a death before ready; doubles with each in a row."""
    max_delay_s: float = 10.0
    give_up_after: int = 5
    """Deaths in a row, none of them ready, after which we stop trying."""

    def delay_s(self, early_deaths: int) -> float:
        """Pause after this many deaths in a row before ready."""
        return min(self.max_delay_s, self.first_delay_s * 2 ** (early_deaths - 1)) if early_deaths else 0.0


class EngineProcess:
    """One life of the child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pipes: list[asyncio.Task[None]] = []
        self.was_ready = False
        self.last_words = ""
        """Its error message, or else the last line of its standard error."""

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        on_progress: Callable[[Progress], None],
        on_stderr: Callable[[str], None],
        env: Mapping[str, str] | None = None,
    ) -> Self:
        """Start `command` with `--progress-fd N` added, in a session of its own: Ctrl-C is for us to pass on."""
        read_fd, write_fd = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--progress-fd",
                str(write_fd),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                limit=LINE_BYTES,
                pass_fds=(write_fd,),
                start_new_session=True,
                env=env,
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)  # the child holds the only one, so its death ends the pipe
        child = cls(process)
        assert process.stderr is not None
        child._pipes = [
            asyncio.ensure_future(child._follow_progress(os.fdopen(read_fd, "rb", 0), on_progress)),
            asyncio.ensure_future(child._follow_stderr(process.stderr, on_stderr)),
        ]
        return child

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Return the exit code (minus the signal, if one killed it) when it is dead and has been heard out."""
        code = await self._process.wait()
        _, deaf = await asyncio.wait(self._pipes, timeout=PIPES_TIMEOUT_S)
        for task in deaf:
            task.cancel()
        return code

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, timeout_s: float) -> None:
        """Ask it to drain (SIGTERM); kill it after `timeout_s`."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except TimeoutError:
                logger.warning("engine process %d did not end in %g s and is killed", self.pid, timeout_s)
                self.kill()
                await self._process.wait()

    async def _follow_progress(self, pipe, on_progress: Callable[[Progress], None]) -> None:
        lines = asyncio.StreamReader(limit=LINE_BYTES)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), pipe)
        try:
            while line := await lines.readline():
                progress = _parse(line)
                if progress.phase == ERROR:
                    self.last_words = progress.message
                self.was_ready |= progress.phase == READY
                on_progress(progress)
        finally:
            transport.close()

    async def _follow_stderr(self, lines: asyncio.StreamReader, on_stderr: Callable[[str], None]) -> None:
        last = ""
        while line := (await _read_line(lines)).decode(errors="replace"):
            last = line.strip() or last
            on_stderr(line)
        self.last_words = self.last_words or last


async def _read_line(lines: asyncio.StreamReader) -> bytes:
    """The next line, or as much of it as fits."""
    try:
        return await lines.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await lines.readexactly(error.consumed)


def _parse(line: bytes) -> Progress:
    try:
        said = json.loads(line)
        return Progress(
            str(said["phase"]),
            int(said.get("done", 0)),
            int(said.get("total", 0)),
            str(said.get("message", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return Progress("unknown", message=line.decode(errors="replace").strip())


def _to_our_stderr(line: str) -> None:
    sys.stderr.write(line)


class Supervisor:
    """Keeps one engine process alive on a private Unix socket. Used from one event loop, in the main thread.

    (From another thread the child would be killed when that thread ends, see `ParentLink.die_with_parent`.)
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        socket: Path | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_event: Callable[[ProcessEvent], None] = lambda event: None,
        on_stderr: Callable[[str], None] = _to_our_stderr,
        policy: RestartPolicy | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            command: What to run, such as `[sys.executable, "-m", "xlane.server", "engine", "--model-id", …]`.
            socket: Where the engine listens; default a new private folder, removed at the end.
            on_progress: Told how far each start has come.
            on_event: Told what happens to the processes; `events` keeps the last of it.
            on_stderr: Given each line the child writes to its standard error.
            policy: When to start again.
            env: The child's environment; default ours.
        """
        self._folder = None if socket else tempfile.TemporaryDirectory(prefix="xlane-")
        self._socket = socket or Path(self._folder.name if self._folder else "", "engine.sock")
        self._command = [*command, "--uds", str(self._socket)]
        self._on_progress, self._on_event, self._on_stderr = on_progress, on_event, on_stderr
        self._policy = policy or RestartPolicy()
        self._env = env
        self._child: EngineProcess | None = None
        self._ever_ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self.address = f"unix:{self._socket}"
        """What a client connects to."""
        self.events: deque[ProcessEvent] = deque(maxlen=KEPT_EVENTS)
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The child that is there now."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Return when the first engine is ready. Whatever happens, `stop` must be called in the end.

        Raises PlanError if it says that it can never start here, EngineLost if it keeps dying before it is ready.
        """
        self._running = asyncio.ensure_future(self._run())
        ready = asyncio.ensure_future(self._ever_ready.wait())
        await asyncio.wait([ready, self._running], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._running.done():
            self._clean_up()
            await self._running
            raise EngineStopped("the engine was stopped before it was ready")

    async def wait(self) -> None:
        """Return after `stop`. Raises EngineLost if the engine has died too often to be started again."""
        if self._running is not None:
            await asyncio.shield(self._running)

    async def stop(self, timeout_s: float = 30.0) -> None:
        """Let the engine drain and end; kill it after `timeout_s`."""
        self._stopping.set()
        if self._child is not None:
            await self._child.stop(timeout_s)
        if self._running is not None:
            await asyncio.wait([self._running])
        self._clean_up()

    def kill(self) -> None:
        """End an engine that hangs; another one is started."""
        if self._child is not None:
            self._child.kill()

    async def watch(
        self, answers: Callable[[], Awaitable[object]], *, pause_s: float = LOOK_S, misses: int = MISSES
    ) -> None:
        """Kill each engine that was ready and answers no more, whatever it does: it may be stopped, or turn in a loop of its own. Runs
        until cancelled.

        `answers` asks it, and raises EngineLost if nothing comes in the time it may take.
        """
        missed, asked = 0, None
        while True:
            await asyncio.sleep(pause_s)
            child = self._child
            if child is None or not child.was_ready:  # it loads or compiles, for as long as that takes
                continue
            missed, asked = (missed if child is asked else 0), child
            try:
                await answers()
                missed = 0
            except EngineLost as error:
                missed += 1
                if missed >= misses and child is self._child:
                    logger.error(
                        "engine process %d is killed: %d times in a row %s", child.pid, missed, error
                    )
                    child.kill()
                    asked = None

    def _clean_up(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    async def _run(self) -> None:
        early_deaths = 0
        while not self._stopping.is_set():
            child = await self._start_one()
            if self._stopping.is_set():
                await child.stop(0)  # `stop` was called while there was no child to tell
            code = await child.wait()
            if self._stopping.is_set():
                self._note("stopped", child, _describe(code))
                return
            self._note("died", child, f"{_describe(code)}: {child.last_words}")
            early_deaths = 0 if child.was_ready else early_deaths + 1
            self._give_up(child, code, early_deaths)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._policy.delay_s(early_deaths))
            self.restarts += not self._stopping.is_set()

    async def _start_one(self) -> EngineProcess:
        def on_progress(progress: Progress) -> None:
            if progress.phase == READY and self._child is not None:
                self._ever_ready.set()
                self._note("ready", self._child, "")
            self._on_progress(progress)

        self._child = await EngineProcess.start(
            self._command, on_progress=on_progress, on_stderr=self._on_stderr, env=self._env
        )
        self._note("started", self._child, " ".join(self._command))
        return self._child

    def _give_up(self, child: EngineProcess, code: int, early_deaths: int) -> None:
        """Raises if another try is of no use."""
        if code == CANNOT_START and not self._ever_ready.is_set():
            self._note("gave_up", child, child.last_words)
            raise PlanError(child.last_words or "the engine cannot start here and did not say why")
        if early_deaths >= self._policy.give_up_after:
            self._note("gave_up", child, child.last_words)
            raise EngineLost(
                f"the engine died {early_deaths} times in a row before it was ready ({_describe(code)}); "
                f"its last words: {child.last_words or 'none'}"
            )

    def _note(self, kind: str, child: EngineProcess, detail: str) -> None:
        event = ProcessEvent(kind, child.pid, detail, time.time())
        self.events.append(event)
        self._on_event(event)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


class ParentLink:
    """The child's end of the progress pipe. May be used from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        os.set_inheritable(fd, False)  # a grandchild that held it would hide our death

    def report(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Say how far the start has come."""
        self._write({"phase": phase, "done": done, "total": total})

    def ready(self) -> None:
        """Say that requests are served."""
        self._write({"phase": READY})

    def failed(self, message: str) -> None:
        """Say why the start is of no use; exit with CANNOT_START afterwards."""
        self._write({"phase": ERROR, "message": message})

    def _write(self, line: dict[str, object]) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            os.write(self._fd, json.dumps(line).encode() + b"\n")

    def die_with_parent(self) -> None:
        """From now on this process is killed when its parent is gone. Call it first of all.

        Linux kills us itself, even if Python hangs; what it misses (the parent died before this call) and other systems
        are seen from the pipe.
        """
        if sys.platform == "linux":
            pr_set_pdeathsig = 1
            ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        threading.Thread(target=self._watch, name="parent-watch", daemon=True).start()

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._fd, 0)  # nothing but the closing of the other end
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)
