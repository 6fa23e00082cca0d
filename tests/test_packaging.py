"""What setuptools is told equals what lies in the tree: a forgotten folder would be missing only at a user's."""

import fnmatch
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "models", "sharding", "server", "tpu")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> dict[str, str]:
    """Package name -> folder, for every folder with an `__init__.py`."""
    folders = (path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py"))
    return {"xlane." + ".".join(folder.parts): folder.as_posix() for folder in folders}


def test_package_list_equals_the_tree(project: dict[str, Any]):
    told = project["tool"]["setuptools"]
    assert sorted(told["packages"]) == sorted(packages_on_disk())
    assert told["package-dir"] == packages_on_disk()


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_room_is_typed():
    assert [room for room in ROOMS if not (ROOT / room / "py.typed").exists()] == []


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: stray files cannot be told from sources")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_data_files_travel_with_the_package(project: dict[str, Any]):
    globs = project["tool"]["setuptools"]["package-data"]["*"]
    # Shell scripts are for those who change the code, not for those who install it.
    data = [path for path in tracked_files() if path.suffix not in (".py", ".pyi", ".sh")]
    packed = [path for path in data if any(fnmatch.fnmatch(path.name, glob) for glob in globs)]
    assert [path.relative_to(ROOT).as_posix() for path in data if path not in packed] == []
    assert [path.as_posix() for path in data if not (path.parent / "__init__.py").exists()] == []


def test_the_installed_package_is_this_one(project: dict[str, Any]):
    scripts = {script.name: script.value for script in metadata.entry_points(group="console_scripts")}
    assert metadata.version("xlane") == project["project"]["version"]
    assert {name: scripts[name] for name in project["project"]["scripts"]} == project["project"]["scripts"]


def test_the_readme_tells_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -e . && xlane serve" in lines
    assert 'pip install -e ".[test]" && pytest' in lines
    assert (ROOT / ".dev" / "check").read_text().splitlines()[-1] == 'step pytest "$@"'
