"""Imports between rooms point one way. Read from the source, so a forbidden edge fails even where it is never run."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("server", "engine", "models", "sharding", "tpu")

ALLOWED = {
    "server": {
        "engine",
        "models.tokenizer",
        "models.hub",
        "models.demo",
        "models.errors",
        "models.guidance",
        "models.template_processes",
    },
    "engine": {"models", "sharding", "tpu"},
    "models": {"sharding"},
    "sharding": set[str](),
    "tpu": set[str](),
}
"""What a room may import of other rooms: a whole room, or one module of it."""

NO_JAX = ("jax", "jaxlib", "flax", "optax")
HOST_FILES = {
    "engine": {
        "__init__", "scheduler", "pages", "request", "errors", "config", "client", "local",
        "rpc_server", "rpc_client", "replay", "process", "grammar", "address", "affinity", "fleet", "replica", "replicas", "totals",
    },
    "models": {"__init__", "tokenizer", "hub", "demo", "errors", "config", "guidance", "template_processes"},
}  # fmt: skip
"""Files that must import where there is no accelerator stack at all. Every file of `server` is one."""


def imported(path: Path, package: str) -> list[str]:
    """Absolute names of all that a file imports, at any depth and under TYPE_CHECKING too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def is_host_file(room: str, relative: Path) -> bool:
    return room == "server" or (len(relative.parts) == 1 and relative.stem in HOST_FILES.get(room, ()))


def complaints(room: str, relative: Path, names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        top, *rest = name.split(".")
        if top in ROOMS:
            found.append(f"{room}/{relative} imports {name}: inside the package, import relatively")
        elif top == "xlane" and rest and rest[0] != room:
            target = ".".join(rest)
            if not any(target == edge or target.startswith(f"{edge}.") for edge in ALLOWED[room]):
                found.append(f"{room}/{relative} imports {name}: {room} may import {sorted(ALLOWED[room])}")
        elif top in NO_JAX and is_host_file(room, relative):
            found.append(f"{room}/{relative} imports {name}: this file must work without jax")
    return found


def violations(root: Path) -> list[str]:
    found: list[str] = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            relative = path.relative_to(root / room)
            package = ".".join(["xlane", room, *relative.parts[:-1]])
            found += complaints(room, relative, imported(path, package))
    return found


def test_imports_point_one_way():
    assert violations(ROOT) == []


def plant(root: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return violations(root)


def test_an_upward_import_is_found(tmp_path: Path):
    found = plant(tmp_path, {"models/decoder.py": "def f():\n    from ..engine.request import Request\n"})
    assert len(found) == 1
    assert "models/decoder.py imports xlane.engine.request.Request" in found[0]


def test_other_ways_to_cheat_are_found(tmp_path: Path):
    found = plant(
        tmp_path,
        {
            "server/app.py": "import jax.numpy as jnp\n",
            "server/chat.py": "from ..models.decoder import decode\n",
            "engine/scheduler.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jax import Array\n",
            "engine/kernels/native/calls.py": "from ....server import app\n",
            "engine/loop.py": "from models.config import ModelConfig\n",
            "tpu/topology.py": "from .. import sharding\n",
        },
    )
    assert [line.split(":")[0] for line in found] == [
        "server/app.py imports jax.numpy",
        "server/chat.py imports xlane.models.decoder.decode",
        "engine/kernels/native/calls.py imports xlane.server.app",
        "engine/loop.py imports models.config.ModelConfig",
        "engine/scheduler.py imports jax.Array",
        "tpu/topology.py imports xlane.sharding",
    ]


def test_what_is_allowed_is_not_reported(tmp_path: Path):
    found = plant(
        tmp_path,
        {
            "server/serve.py": "from ..engine import EngineConfig\nfrom ..models.tokenizer import Tokenizer\n",
            "server/get.py": "from ..models import hub\n",
            "engine/programs.py": "import jax\nfrom ..models.decoder import decode\nfrom ..tpu.device import of\n",
            "models/families/llama.py": "from ..config import ModelConfig\nfrom ...sharding.axes import AXES\n",
        },
    )
    assert found == []
