"""`xlane serve` as a process of its own, from start to stop. Knows how to start it and whose child its engine is; nothing of
what is asked of it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_S = 240
"""A first start compiles, and the machine may be busy."""
STOP_S = 300


@dataclass(frozen=True)
class Served:
    """A running `xlane serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def engine_pid(self) -> int | None:
        """The process id of its engine child; None while there is none."""
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in path.read_text().split():
                return int(pid)
        return None

    def healthy(self) -> bool:
        """Whether requests are served now."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextmanager
def whole_server(log: Path, *options: str, module: str = "xlane.server") -> Iterator[Served]:
    """Serve until the block ends, on a free port, without this process's own settings of JAX. `module` is what is run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", "--port", str(port), *options],
            stdout=output, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
    served = Served(process, f"http://127.0.0.1:{port}", log)
    try:
        until = time.monotonic() + READY_S
        while not served.healthy():
            assert process.poll() is None, log.read_text()
            if time.monotonic() > until:
                raise TimeoutError(log.read_text())
            time.sleep(0.2)
        yield served
    finally:
        process.terminate()
        try:
            code = process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert code == 0, log.read_text()
