"""The devices, who computes on them, and whether the models fit: findings of `xlane doctor`.

Asked in a process of its own, because a broken driver hangs or kills whoever asks it. Knows no jax: what is asked is
`engine/look.py`'s.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..engine.config import EngineConfig
from ..engine.errors import EngineError
from ..models.errors import ModelError
from .console import bytes_text
from .findings import Finding

TIMEOUTS_S = {"devices": 60, "kernels": 330, "fit": 120}
"""For each answer. The native kernels may have to be compiled, which a start would do, too."""
_ACCELERATORS = (("/dev/nvidia0", "NVIDIA GPU", "cuda"), ("/dev/accel0", "TPU", "tpu"), ("/dev/vfio/0", "TPU", "tpu"))  # fmt: skip


Plans = Mapping[str, tuple[EngineConfig, Path]]
"""How each model is run, and where it lies, by its name; of one that is alone none is needed."""


def machine(
    engine: EngineConfig, models: Plans, look: Callable[..., None] | None = None
) -> Iterator[Finding]:
    """The devices, who computes on them, and whether each model fits. `look` runs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=look or _look, args=(theirs, engine, models), daemon=True)
    process.start()
    theirs.close()
    awaited = "devices"
    try:
        while ours.poll(TIMEOUTS_S[awaited]):
            what, facts = ours.recv()
            if what == "end":
                return
            if what == "error":
                yield Finding(awaited, "fail", facts)
                return
            yield judged(what, facts)
            native = what == "devices" and facts["platform"] == "cpu" and engine.kernels in ("auto", "native")
            awaited = "kernels" if native else "fit"
        driver = "see whether another process holds the device, and its driver"
        do = driver if awaited == "devices" else "try again when the machine is less busy"
        yield Finding(awaited, "fail", f"no answer within {TIMEOUTS_S[awaited]} s", do)
    except EOFError:
        process.join()
        died = f"who looked at it died (exit code {process.exitcode})"
        yield Finding(awaited, "fail", died, "see the driver's log")
    finally:
        process.kill()
        process.join()


def _look(told: Connection, engine: EngineConfig, models: Plans) -> None:
    try:
        from ..engine.look import look

        for piece in look(engine, models):
            told.send(piece)
        told.send(("end", None))
    except (EngineError, ModelError, RuntimeError, OSError) as error:
        told.send(("error", str(error).splitlines()[0]))


def judged(what: str, facts: Mapping[str, Any]) -> Finding:
    """What to think of a piece that was told."""
    if what == "devices":
        text = f"{facts['count']} x {facts['kind']} ({facts['platform']})"
        for file, name, extra in _ACCELERATORS:
            if facts["platform"] == "cpu" and Path(file).exists():
                return Finding(
                    "devices",
                    "warn",
                    f"{text}, though there is a {name}",
                    f"pip install 'xlane[{extra}]', and unset JAX_PLATFORMS",
                )
        return Finding("devices", "ok", text)
    if what == "kernels":
        if facts["name"]:
            return Finding("kernels", "ok", facts["name"])
        return Finding(
            "kernels", "warn", f"XLA's own, several times slower: {facts['why']}", "install g++ or clang++"
        )
    of = f"{facts['name']}: " if facts["name"] else ""
    if what == "unfit":
        return Finding("fit", "fail", of + facts["why"].splitlines()[0])
    return Finding("fit", "ok",
        f"{of}weights {bytes_text(facts['weights bytes'])} and {bytes_text(facts['KV cache bytes'])} of KV cache in "
        f"{bytes_text(facts['memory bytes'])}: {facts['lanes']} lanes, {facts['KV cache tokens']:,} tokens")  # fmt: skip
