"""No code comes from data: what the package imports and calls is read, and holds nothing that could run or fetch it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "models", "server", "sharding", "tpu")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

RUNS_DATA = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch",
    "runpy",
    "code",
}
"""Modules that make code or objects of what they read."""
FETCHES = {
    "urllib.request",
    "requests",
    "httpx",
    "aiohttp",
    "http.client",
    "ftplib",
    "telnetlib",
    "urllib3",
    "smtplib",
}
MAY_FETCH = {
    "models/hub_fetch.py": "downloads models from the Hub that whoever runs it names",
    "server/remote.py": "asks the server that whoever types `xlane chat` or `xlane top` names",
}
CALLS = {"eval", "exec", "compile", "__import__"}
"""Builtins that run a text."""
NAMED = {"pickle", "trust_remote_code", "allow_pickle", "weights_only", "shell", "torch_load"}
"""Arguments that ask a library for it."""
MEMBERS = {"import_module", "exec_module", "unsafe_load", "system", "popen"}
"""Methods that load code."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id
        if isinstance(node.func, ast.Attribute) and node.func.attr in MEMBERS:
            yield node.func.attr
        if isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained" and not forbids(node):
            yield "from_pretrained without trust_remote_code=False"
        for keyword in node.keywords:
            if keyword.arg in NAMED and not is_false(keyword.value):
                yield f"{keyword.arg}="


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def forbids(call: ast.Call) -> bool:
    """Whether it says that a model's code is not to be run; unsaid, transformers would ask on the terminal."""
    return any(keyword.arg == "trust_remote_code" and is_false(keyword.value) for keyword in call.keywords)


def wrong(name: str, text: str) -> list[str]:
    tree = ast.parse(text)
    found = [module for module in imports(tree) if module.split(".")[0] in RUNS_DATA]
    if name not in MAY_FETCH:
        found += [module for module in imports(tree) if module in FETCHES or module.split(".")[0] in FETCHES]
    return found + list(calls(tree))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_runs_or_fetches_what_it_reads(path: Path):
    assert wrong(name_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from torch import load", "import torch.hub", "eval(x)", "exec(x)", "__import__(x)", "a.import_module(x)",
     "np.load(f, allow_pickle=True)", "f(trust_remote_code=True)", "f(trust_remote_code=flag)", "import urllib.request",
     "from urllib import request", "from http import client", "import httpx", "run(c, shell=True)", "os.system(c)",
     "AutoConfig.from_pretrained(p)"],
)  # fmt: skip
def test_it_would_be_found(text: str):
    assert wrong("x.py", text) != []


def test_what_may_fetch_is_there():
    assert [name for name in MAY_FETCH if not (ROOT / name).is_file()] == []


def test_every_test_that_security_md_names_is_there():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    assert [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text()] == []
