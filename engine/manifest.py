"""What was compiled, written down beside the cache: for the next start, which knows from it what its programs need before
they are there, for whoever warms a cache offline, and for whoever asks why a start was slow. Knows no jax."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .identity import depends_on, source_digest
from .programs import Programs
from .request import ProgramInfo
from .step import Blueprint
from .traced import write_whole


def write_manifest(config: EngineConfig, programs: Programs, jax_version: str) -> Path | None:
    """Write the manifest of an engine's programs; None if nothing is kept between starts.

    The name is a digest of what the programs depend on, so one model with two sets of options has two manifests.
    """
    if config.cache_dir is None:
        return None
    depends = _depends(programs.blueprint, jax_version)
    path = _path(config.cache_dir, depends)
    content = {"model_id": config.model_id, **depends, "programs": [asdict(info) for info in programs.infos]}
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def read_manifest(config: EngineConfig, blueprint: Blueprint, jax_version: str) -> tuple[ProgramInfo, ...]:
    """What an earlier start wrote of these very programs; nothing if none did."""
    if config.cache_dir is None:
        return ()
    path = _path(config.cache_dir, _depends(blueprint, jax_version))
    try:
        infos = tuple(ProgramInfo(**told) for told in json.loads(path.read_bytes())["programs"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # none, or not one of ours: then all is as at the first start
        return ()
    return infos if [info.name for info in infos] == [size.name for size in blueprint.sizes] else ()


def _depends(blueprint: Blueprint, jax_version: str) -> dict[str, Any]:
    return depends_on(blueprint, jax_version) | {"source": source_digest()}


def _path(cache_dir: str, depends: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_dir) / "manifests" / f"{digest}.json"
