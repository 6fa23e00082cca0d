"""What was compiled, written down beside the cache: for whoever warms a cache offline, and for whoever asks why a start
was slow. Knows no jax."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from .config import EngineConfig
from .programs import Programs
from .step import Blueprint


def depends_on(blueprint: Blueprint, jax_version: str) -> dict[str, Any]:
    """All that decides what is compiled, by name."""
    return {
        "model": asdict(blueprint.config),
        "dtype": blueprint.dtype,
        "quantize": blueprint.quantize,
        "kv_dtype": blueprint.kv_dtype,
        "shapes": blueprint.shapes._asdict(),
        "sizes": [size.name for size in blueprint.sizes],
        "prefill_segments": blueprint.prefill_segments,
        "watermark": blueprint.watermark._asdict(),
        "mesh": dict(blueprint.placement.mesh.shape),
        "kernels": blueprint.kernels.name,
        "jax": jax_version,
    }


def write_manifest(config: EngineConfig, programs: Programs, jax_version: str) -> Path | None:
    """Write the manifest of an engine's programs; None if nothing is kept between starts.

    The name is a digest of what the programs depend on, so one model with two sets of options has two manifests.
    """
    if config.cache_dir is None:
        return None
    depends = depends_on(programs.blueprint, jax_version)
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(config.cache_dir) / "manifests" / f"{digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model_id": config.model_id, **depends, "programs": [asdict(info) for info in programs.infos]}
    # Engines that start at once over one directory each write their own file; the last to finish stays.
    with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as temporary:
        temporary.write(json.dumps(content, indent=2) + "\n")
    Path(temporary.name).chmod(0o644)
    Path(temporary.name).replace(path)
    return path
