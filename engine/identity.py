"""What decides what is compiled, by name: under it programs, manifests and prefix caches are kept between starts. Knows no
jax."""

import hashlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from .step import Blueprint

_ROOMS = Path(__file__).parent.parent
_TRACED_FROM = ("engine", "models", "sharding", "tpu")


def depends_on(blueprint: Blueprint, jax_version: str) -> dict[str, Any]:
    """All that decides what is compiled, but the code itself."""
    return {
        "model": asdict(blueprint.config),
        "dtype": blueprint.dtype,
        "quantize": blueprint.quantize,
        "kv_dtype": blueprint.kv_dtype,
        "shapes": blueprint.shapes._asdict(),
        "sizes": [size.name for size in blueprint.sizes],
        "heads": blueprint.heads and asdict(blueprint.heads),
        "prefill_segments": blueprint.prefill_segments,
        "watermark": blueprint.watermark._asdict(),
        "mesh": dict(blueprint.placement.mesh.shape),
        "device": blueprint.placement.device.device_kind,
        "kernels": blueprint.kernels.name,
        "jax": jax_version,
    }


@cache
def source_digest() -> str:
    """Of the code that programs are traced from."""
    digest = hashlib.sha256()
    for room in _TRACED_FROM:
        for path in sorted((_ROOMS / room).rglob("*.py")):
            digest.update(path.relative_to(_ROOMS).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
