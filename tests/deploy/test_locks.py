"""What images and TPU hosts install: every dependency, with what it depends on itself, at one version, by hash."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"cpu": ["otel"], "cuda": ["otel", "cuda"], "tpu": ["otel", "tpu"]}
BROUGHT = {"cpu": [], "cuda": ["jax-cuda13-plugin", "jax-cuda13-pjrt"], "tpu": ["libtpu"]}
"""By an extra of jax, whose parts may not be installed here."""
LINE = re.compile(r"([a-z0-9._-]+)(?:\[[a-z0-9,-]+\])?==(\S+)(?: ; .+?)?((?: --hash=sha256:[0-9a-f]{64})+)")


def locked(name: str) -> dict[str, Version]:
    """What a lock pins. Fails if there is a line of any other form: without a hash, from another place, an option."""
    text = (ROOT / f"tpu/requirements-{name}.lock").read_text().replace(" \\\n   ", "")
    lines = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(lines), [line for line, found in zip(text.splitlines(), lines, strict=True) if not found]
    return {canonicalize_name(found[1]): Version(found[2]) for found in lines if found}


def asked_for(name: str) -> list[Requirement]:
    """All that has to be there here, from what builds the package on."""
    project = PROJECT["project"]
    extras = [line for extra in EXTRAS[name] for line in project["optional-dependencies"][extra]]
    lines = [*PROJECT["build-system"]["requires"], *project["dependencies"], *extras]
    needed = [Requirement(line) for line in lines]
    for requirement in needed:  # it grows meanwhile
        try:
            further = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        for line in map(Requirement, further):
            wanted = any(
                line.marker is None or line.marker.evaluate({"extra": extra})
                for extra in ("", *requirement.extras)
            )
            if wanted and str(line) not in map(str, needed):
                needed.append(line)
    return needed


@pytest.mark.parametrize("name", EXTRAS)
def test_every_dependency_is_locked_within_its_bounds(name: str):
    pins = locked(name)
    asked = [one for one in asked_for(name) if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert [str(one) for one in asked if canonicalize_name(one.name) not in pins] == []
    assert [
        str(one) for one in asked if not one.specifier.contains(pins[canonicalize_name(one.name)], True)
    ] == []
    assert set(BROUGHT[name]) <= set(pins)
    assert len(asked) > 30
