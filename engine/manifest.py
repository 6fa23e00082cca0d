"""What was compiled, written down beside the cache: for whoever warms a cache offline, and for whoever asks why a start
was slow. Knows no jax."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .programs import Programs


def write_manifest(config: EngineConfig, programs: Programs, jax_version: str) -> Path | None:
    """Write the manifest of an engine's programs; None if nothing is kept between starts.

    The name is a digest of what the programs depend on, so one model with two sets of options has two manifests.
    """
    if config.cache_dir is None:
        return None
    blueprint = programs.blueprint
    depends: dict[str, Any] = {
        "model": asdict(blueprint.config),
        "dtype": blueprint.dtype,
        "shapes": blueprint.shapes._asdict(),
        "mesh": dict(blueprint.placement.mesh.shape),
        "kernels": blueprint.kernels.name,
        "jax": jax_version,
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(config.cache_dir) / "manifests" / f"{digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model_id": config.model_id, **depends, "programs": [asdict(info) for info in programs.infos]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
    return path
