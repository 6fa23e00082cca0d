"""What was compiled, written down beside the cache: for whoever warms a cache offline, and for whoever asks why a start
was slow. Knows no jax."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from .config import EngineConfig
from .identity import depends_on
from .programs import Programs
from .traced import write_whole


def write_manifest(config: EngineConfig, programs: Programs, jax_version: str) -> Path | None:
    """Write the manifest of an engine's programs; None if nothing is kept between starts.

    The name is a digest of what the programs depend on, so one model with two sets of options has two manifests.
    """
    if config.cache_dir is None:
        return None
    depends = depends_on(programs.blueprint, jax_version)
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(config.cache_dir) / "manifests" / f"{digest}.json"
    content = {"model_id": config.model_id, **depends, "programs": [asdict(info) for info in programs.infos]}
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
    return path
