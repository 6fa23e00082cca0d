"""Importing does nothing: no device is touched, nothing is logged, configured or written to the environment.

Each room is imported in a fresh interpreter, module by module, and looked at after each one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_layering import HOST_FILES, ROOMS, ROOT

_PROBE = """
import importlib, json, logging, os, signal, sys, threading
modules, baseline = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name in baseline:
    importlib.import_module(name)

def world():
    bridge = sys.modules.get("jax._src.xla_bridge")
    return {
        "environment": dict(os.environ),
        "root logger": [logging.root.level, [str(h) for h in logging.root.handlers], logging.root.disabled],
        "threads": sorted(t.name for t in threading.enumerate()),
        "signal handlers": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "devices": bool(bridge and bridge.backends_are_initialized()),
        "jax": "jax" in sys.modules,
    }

before, changes = world(), []
for name in modules:
    importlib.import_module(name)
    now = world()
    changes += [f"importing {name} changed: {what}" for what in now if now[what] != before[what]]
    before = now
print(json.dumps(changes))
"""


def modules_of(room: str) -> list[str]:
    names: list[str] = []
    for path in sorted((ROOT / room).rglob("*.py")):
        if path.stem != "__main__":
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(["xlane", *(parts[:-1] if parts[-1] == "__init__" else parts)]))
    return names


def changes(modules: list[str], baseline: tuple[str, ...] = ()) -> list[str]:
    """What importing `modules` one after the other changed, after `baseline` is there."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps(modules), json.dumps(baseline)],
        capture_output=True, text=True, timeout=300, cwd=os.path.dirname(sys.executable), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def host_modules() -> list[str]:
    listed = {f"xlane.{room}" if stem == "__init__" else f"xlane.{room}.{stem}"
              for room, stems in HOST_FILES.items() for stem in stems}  # fmt: skip
    return [name for room in ROOMS for name in modules_of(room) if name in listed or room == "server"]


def test_host_modules_do_nothing_and_need_no_jax():
    assert changes(host_modules()) == []


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "server"])
def test_device_modules_do_nothing(room: str):
    modules = [name for name in modules_of(room) if name not in host_modules()]
    # What jax and flax do when they are imported is theirs; what our modules add is looked at.
    assert changes(modules, baseline=("jax", "flax.nnx", "logging.config")) == []


def test_the_probe_sees_a_module_that_does_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "loud.py").write_text("import logging, os\nos.environ['X'] = '1'\nlogging.basicConfig()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert changes(["loud"]) == ["importing loud changed: environment", "importing loud changed: root logger"]


HEAVY = (
    "asyncio", "filelock", "flax", "google.protobuf", "grpc", "huggingface_hub", "jax", "llguidance", "msgspec",
    "numpy", "orjson", "prometheus_client", "rich", "starlette", "tokenizers", "transformers", "uvicorn", "uvloop",
)  # fmt: skip
"""What takes longer to import than the first line of a command may take to come."""

_FIRST_LINE = """
import json, sys
from xlane.server import cli

class FirstLine(Exception): pass

class Output:
    def write(self, text): raise FirstLine
    def flush(self): pass
    def isatty(self): return False

sys.stdout, shown = Output(), sys.stdout
try:
    cli.run(sys.argv[2:], {})
except FirstLine:
    sys.stdout = shown
    print(json.dumps([name for name in json.loads(sys.argv[1]) if name in sys.modules]))
"""


@pytest.mark.parametrize("command", ["--help", "serve --help", "bench serve --help", "serve --port 0"])
def test_nothing_heavy_is_imported_before_the_first_line(command: str):
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_LINE, json.dumps([*HEAVY, "xlane.server.cli"]), *command.split()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The last shows that the probe would see a module that is there.
    assert json.loads(done.stdout) == ["xlane.server.cli"]


UNADVISED = """
import sys
sys.modules |= dict.fromkeys(("torch", "tensorflow", "flax"))  # as if they were not installed
from xlane.models.unadvised import unadvised
with unadvised():
    from transformers import AutoTokenizer
print("hi!")
"""


def test_nobody_is_told_to_install_what_nothing_here_computes_with():
    done = subprocess.run([sys.executable, "-c", UNADVISED], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("hi!\n", "")
