"""From a model on disk to a running engine, and what can be said of one beforehand. Where jax is set up for serving.

What commands call: `start` serves, `warm` only compiles, `describe` only computes. Knows no command line.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ..models.opened import open_model
from .build import Progress, design
from .config import EngineConfig
from .engine import Engine
from .programs import compile_all
from .request import ProgramInfo
from .state import page_bytes

MANIFEST = "manifest.json"


def set_up_jax(config: EngineConfig) -> None:
    """Keep compiled programs in `cache_dir`. Called before the first device is touched."""
    if config.cache_dir is not None:
        folder = Path(config.cache_dir) / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Every program is needed at the next start, also one that was quick to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def start(
    config: EngineConfig, path: Path, sha: str | None = None, progress: Progress | None = None
) -> Engine:
    """An engine that takes requests. Raises PlanError and ModelError."""
    set_up_jax(config)
    opened = open_model(path, weights=config.load_format != "dummy")
    return Engine.build(config, opened.config, opened.source, progress, sha)


def warm(config: EngineConfig, path: Path, progress: Callable[[int, int], None]) -> Path | None:
    """Compile every program of a model into `cache_dir`, loading no weights -> the manifest, if there is a place for it.

    Raises PlanError and ModelError.
    """
    set_up_jax(config)
    began = time.perf_counter()
    blueprint, memory, note = design(config, open_model(path, weights=False).config)
    programs = compile_all(blueprint, progress).infos
    if config.cache_dir is None:
        return None
    manifest = Path(config.cache_dir) / MANIFEST
    content = {
        "model": config.model_id,
        "dtype": blueprint.dtype,
        "device": blueprint.placement.mesh.devices.flat[0].device_kind,
        "kernels": note,
        "lanes": memory.lanes,
        "pages": memory.pages,
        "max_total_tokens": memory.max_total_tokens,
        "jax": jax.__version__,
        "seconds": round(time.perf_counter() - began, 3),
        "programs": [_row(program) for program in programs],
    }
    manifest.write_text(json.dumps(content, indent=1) + "\n")
    return manifest


def _row(program: ProgramInfo) -> dict[str, Any]:
    return {name: getattr(program, name) for name in ProgramInfo.__slots__}


def describe(config: EngineConfig, path: Path) -> dict[str, Any]:
    """What a model needs and what it would get on this machine's devices, reading no weights.

    Raises PlanError if it does not fit, ModelError if it is not understood.
    """
    model = open_model(path, weights=False).config
    blueprint, memory, note = design(config, model)
    devices = blueprint.placement.mesh.devices
    parameters = sum(math.prod(spec.shape) for spec in blueprint.graph.specs)
    return {
        "model": config.model_id,
        "family": model.family,
        "parameters": parameters,
        "layers": model.layers,
        "context tokens": model.max_positions,
        "vocabulary": model.vocab_size,
        "dtype": blueprint.dtype,
        "weights bytes": memory.weights_bytes,
        "KV bytes per token": page_bytes(model, config.page_tokens, blueprint.dtype) // config.page_tokens,
        "device": f"{devices.size} x {devices.flat[0].device_kind}",
        "memory bytes": memory.limit_bytes,
        "KV pool bytes": memory.kv_bytes,
        "KV pool tokens": memory.kv_tokens,
        "temporary bytes": memory.temp_bytes,
        "lanes": memory.lanes,
        "max total tokens": memory.max_total_tokens,
        "full-length requests at once": memory.kv_tokens // memory.max_total_tokens,
        "kernels": note,
    }
