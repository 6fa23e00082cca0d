"""`xlane doctor`: looks at all that a start needs and says of each whether it will do, and what to do if not.

Knows what a start needs of the host; the device is `machine.py`'s. Nothing is loaded and nothing is left running.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ..engine.config import EngineConfig
from ..models.demo import default_cache_dir, kept_demo
from ..models.errors import ModelError
from ..models.hub import HubState, hub_state
from .config import ServerConfig
from .console import bytes_text
from .engines import ask_engines
from .findings import Finding, Status
from .flags import RunConfig
from .hosts import open_to_all
from .machine import machine
from .model import DEMO, find_model
from .serve import environment
from .several import configs_of
from .sockets import bind

HUB_TIMEOUT_S = 3.0
LITTLE_ROOM_BYTES, NO_ROOM_BYTES = 2 * 10**9, 10**8
"""Free bytes of a disk below which a download or a compile may not end, and will not."""

_MATTER = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_",
    "XLA_PYTHON_",
    "CUDA_VISIBLE",
    "NVIDIA_",
    "TPU_",
    "HF_",
    "XLANE_",
    "OMP_NUM",
)
"""Beginnings of variables that change what is computed, where and with what."""
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def doctor(
    engine: EngineConfig, server: ServerConfig, run: RunConfig, environ: Mapping[str, str], *, as_json: bool
) -> int:
    """Print one line for each thing, or one JSON object; 1 if any of them keeps a server from starting."""
    findings: list[Finding] = []
    for finding in examine(engine, server, run, environ):
        findings.append(finding)
        if not as_json:
            advice = f" - {finding.do}" if finding.do else ""
            print(f"{finding.status:<5} {finding.name:<10} {finding.found}{advice}", flush=True)
    well = all(finding.status != "fail" for finding in findings)
    if as_json:
        print(json.dumps({"ok": well, "findings": [asdict(finding) for finding in findings]}))
    return 0 if well else 1


def examine(
    engine: EngineConfig, server: ServerConfig, run: RunConfig, environ: Mapping[str, str]
) -> Iterator[Finding]:
    """One finding after the other, what is quick first. Raises UsageError for what no server of several models can be."""
    yield versions()
    yield variables(environ)
    yield access(server)
    yield port(server)
    hub = hub_state(HUB_TIMEOUT_S)
    if hub.offline:
        yield Finding("hub", "ok", "HF_HUB_OFFLINE is set: nothing is fetched")
    elif hub.error:
        yield Finding("hub", "warn", f"{hub.endpoint} does not answer: {hub.error}",
                      "models that are here can be served; for others see the network, a proxy, HF_ENDPOINT")  # fmt: skip
    else:
        yield Finding("hub", "ok", f"{hub.endpoint} answers")
    yield room("cache", Path(engine.cache_dir) if engine.cache_dir else default_cache_dir(), "--cache-dir")
    yield room("models", Path(run.hub_cache or hub.cache_dir), "--huggingface-hub-cache")
    found: dict[str, tuple[EngineConfig, Path]] = {}
    for name, config in configs_of(engine, server, run).items():
        path, finding = _model(config, run, hub)
        yield finding
        if path is not None:
            found[name if server.more_models else ""] = (config, path)
    if run.engines:
        yield engines(run, engine.model_id)
    else:
        yield from machine(engine, found)


def versions() -> Finding:
    """What is installed."""
    rows = dict(environment())
    text = ", ".join(f"{name} {value}" for name, value in rows.items() if name != "platform")
    if rows["jax"] != rows["jaxlib"]:
        return Finding(
            "versions", "warn", text, "jax and jaxlib are made for each other: install the same version"
        )
    return Finding("versions", "ok", text)


def variables(environ: Mapping[str, str]) -> Finding:
    """What the environment changes."""
    found = {name: value for name, value in sorted(environ.items()) if name.startswith(_MATTER) and value}
    shown = [
        name if any(word in name for word in _SECRET) else f"{name}={value}" for name, value in found.items()
    ]
    text = ", ".join(shown) or "none that matters is set"
    if "xla_force_host_platform_device_count" in found.get("XLA_FLAGS", ""):
        return Finding("variables", "warn", text, "the devices are simulated: unset XLA_FLAGS to serve")
    return Finding("variables", "ok", text)


def access(server: ServerConfig) -> Finding:
    """Who may come in."""
    if open_to_all(server):
        return Finding("access", "fail", f"{server.host} is reached from other machines, without a key",
                       "set API_KEY, or --insecure to let everybody in")  # fmt: skip
    who = "with a key" if server.keyed else "without a key"
    return Finding("access", "ok", f"{server.host}, {who}")


def port(server: ServerConfig) -> Finding:
    """Whether the address can be listened on."""
    where = f"{server.host}:{server.port}"
    try:
        bind(server).close()
    except OSError as error:
        do = (
            "stop what listens there, or choose another --port"
            if error.errno == errno.EADDRINUSE
            else "choose --hostname and --port"
        )
        return Finding("port", "fail", f"{where}: {error.strerror or error}", do)
    return Finding("port", "ok", f"{where} is free")


def engines(run: RunConfig, model_id: str) -> Finding:
    """Whether one of those that run elsewhere serves."""
    states, _ = ask_engines(run.engines, model_id)
    found = "; ".join(f"{address} is {told}" for address, told in states.items())
    found = found or f"nobody is found at {', '.join(run.engines)}"
    if all(told == "serving" for told in states.values()) and states:
        return Finding("engines", "ok", found)
    status: Status = "warn" if "serving" in states.values() else "fail"
    return Finding(
        "engines", status, found, "see that `xlane engine` runs there, with the same model for all"
    )


def room(name: str, folder: Path, option: str) -> Finding:
    """Whether a folder can be written and has room."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        return Finding(name, "fail", f"{folder}: {error.strerror}", f"choose {option}")
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding(name, "fail", f"{folder} cannot be written", f"choose {option}")
    free = shutil.disk_usage(there).free
    status: Status = "fail" if free < NO_ROOM_BYTES else "warn" if free < LITTLE_ROOM_BYTES else "ok"
    return Finding(
        name,
        status,
        f"{folder}, {bytes_text(free)} free",
        "" if status == "ok" else f"make room, or choose {option}",
    )


def _model(engine: EngineConfig, run: RunConfig, hub: HubState) -> tuple[Path | None, Finding]:
    """Where the model lies. Of one on the Hub only what describes it is fetched, and nobody is waited for who is silent."""
    kept = Path(engine.cache_dir) if engine.cache_dir else default_cache_dir()
    try:
        if engine.model_id == DEMO and kept_demo(kept) is None:
            return None, Finding("model", "ok", "the demo, which is fetched at the first start (93 MB)")
        model = find_model(replace(engine, load_format="dummy"), run.hub_cache, ask=not hub.error)
    except (ModelError, OSError) as error:
        return None, Finding("model", "fail", f"{engine.model_id}: {error}")
    return model.path, Finding("model", "ok", f"{engine.model_id}, described in {model.path}")
