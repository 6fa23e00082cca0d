"""Files, functions and parameter lists stay small enough to be read. Generated code does not count."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "models", "sharding", "server", "tpu", "tests")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 10

LONGER: dict[str, str] = {}
"""`folder/file.py::function` -> why it may break a limit. Keep it short."""


def sources() -> list[Path]:
    """Of Python and C++."""
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in paths if path.suffix in (".py", ".cc", ".h") and "_pb2" not in path.name)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def too_big(path: Path) -> dict[str, str]:
    """What breaks a limit in one file: its key in LONGER -> what is wrong."""
    name, text = name_of(path), path.read_text()
    found: dict[str, str] = {}
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        found[name] = f"{lines} lines, at most {MAX_FILE_LINES}"
    if path.suffix != ".py":
        return found
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            found[f"{name}::{node.name}"] = f"{lines} lines, at most {MAX_FUNCTION_LINES}"
        if (count := parameters(node)) > MAX_PARAMETERS:
            found[f"{name}::{node.name}"] = f"{count} parameters, at most {MAX_PARAMETERS}"
    return found


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_sizes(path: Path):
    assert {key: why for key, why in too_big(path).items() if key not in LONGER} == {}


def test_every_exception_is_still_needed():
    big = {key for path in sources() for key in too_big(path)}
    assert set(LONGER) - big == set()


@pytest.mark.parametrize(
    "path", [p for p in sources() if "tests" not in p.parts and p.stat().st_size], ids=name_of
)
def test_every_module_says_what_it_is(path: Path):
    text = path.read_text()
    says = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else text.startswith("// ")
    assert says, "the module has no docstring"
