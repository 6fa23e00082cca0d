"""`xlane serve`: says who starts before anything slow is imported, then hands over to the session.

Knows the order of a start and how it is told; what runs is `session.py`'s.
"""

import os
import platform
import sys
from importlib import metadata

from ..engine.config import EngineConfig
from . import logs
from .config import ServerConfig
from .console import Console
from .flags import RunConfig

SHOWN_VERSIONS = ("jax", "jaxlib", "transformers", "tokenizers", "grpcio", "uvicorn")


def serve(engine: EngineConfig, server: ServerConfig, run: RunConfig) -> int:
    """Serve until told to stop; the exit code. Raises EngineError, ModelError, UsageError."""
    console = Console(json_output=run.json_output)
    logs.setup(run.log_level, console.line, json_output=run.json_output)
    console.say(f"xlane {metadata.version('xlane')} starts with model {engine.model_id}")
    if run.show_env:
        console.table("environment", environment())
    # gRPC reads these when it is imported: it would tell of every engine that is started beside it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # What is slow to import (HTTP, gRPC) comes only now.
    import uvloop

    from .session import Session

    session = Session(engine, server, run, console)
    try:
        return uvloop.run(session.run())
    finally:
        console.settle()


def environment() -> list[tuple[str, object]]:
    """Versions that matter in a bug report. Devices are the engine's to name, once it is there."""
    rows: list[tuple[str, object]] = [
        ("xlane", metadata.version("xlane")),
        ("python", sys.version.split()[0]),
        ("platform", platform.platform()),
    ]
    for name in SHOWN_VERSIONS:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows
