"""Processes that apply chat templates, each question within bounds of time and memory. Knows pipes; no templates.

A template is a program of the model's author. In a process of its own it can neither hold up nor starve anybody else, and
ends for certain when it takes too much.
"""

import contextlib
import json
import signal
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import Any

from .errors import TemplateTooCostly, TokenizerError

TEXT, REFUSED, MEMORY = "text", "refused", "memory"
"""Kinds of answers: what was asked for, why not, and that it would have taken too much memory."""
OUT_OF_TIME = signal.SIGPROF
"""What ends a process whose question has used up its time."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one application of a template may take."""

    cpu_s: float = 5.0
    """Seconds of a processor: neither its turn counts, nor what a busy or halted machine does instead."""
    memory_bytes: int = 256_000_000
    """Beside the messages."""


USUAL = TemplateLimits()


class TemplateProcesses:
    """As many as are asked at once, started when they are. From any thread; they end with this object, or its process."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _end, self._idle)

    def ask(self, asked: str, limits: TemplateLimits, **question: Any) -> str:
        """The answer of a function of `template_sandbox`. Blocks.

        Raises:
            ValueError: why there is none.
            TemplateTooCostly: it would have taken too much.
            TokenizerError: the question is no JSON, or nobody can be asked.
        """
        bounds = {"cpu_s": limits.cpu_s, "memory_bytes": limits.memory_bytes}
        try:
            line = json.dumps({"asked": asked, **bounds, **question}).encode()
        except (TypeError, ValueError) as error:
            raise TokenizerError(f"a chat template takes what JSON can say: {error}") from error
        process = self._one()
        try:
            kind, content = _exchange(process, line, limits)
        except BaseException:
            _end([process])
            raise
        if kind == MEMORY:
            _end([process])
            raise TemplateTooCostly(
                f"the chat template takes more than {limits.memory_bytes / 1e6:g} MB of memory for these messages",
                "memory",
            )
        self._idle.append(process)
        text = content.decode(errors="surrogatepass")
        if kind == REFUSED:
            raise ValueError(text)
        return text

    def _one(self) -> subprocess.Popen[bytes]:
        """One that has nothing to do. Raises TokenizerError."""
        with contextlib.suppress(IndexError):
            while (process := self._idle.pop()).poll() is not None:
                _end([process])
            return process
        # `-P`: a folder named xlane where we stand must not be imported. In a session of its own: Ctrl-C is not for it.
        command = [sys.executable, "-P", "-m", "xlane.models.template_sandbox"]
        try:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise TokenizerError(f"no process can be started for the chat template: {error}") from error


def _exchange(process: subprocess.Popen[bytes], line: bytes, limits: TemplateLimits) -> tuple[str, bytes]:
    """Kind and content of the answer. Raises TemplateTooCostly, TokenizerError."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        if head := process.stdout.readline():
            kind, size = json.loads(head)
            if len(content := process.stdout.read(size)) == size:
                return kind, content
    except BrokenPipeError:
        pass
    code = process.wait()
    if code == -OUT_OF_TIME:
        raise TemplateTooCostly(
            f"the chat template takes longer than {limits.cpu_s:g} s for these messages", "time"
        )
    raise TokenizerError(f"the process that applies the chat template ended (exit code {code})")


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what it was not told any more
                    pipe.close()
