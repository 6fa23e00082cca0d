"""What this machine computes with, and whether a model fits on it: found out without loading the model, for `xlane doctor`.

Looking can take long, hang or kill the process, where a driver is broken or another process holds the chip; so it is told
piece by piece. Who looks in a process of its own keeps what was told.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ..models.demo import default_cache_dir
from .config import EngineConfig
from .kernels.native import native_kernels
from .plan import describe


def look(config: EngineConfig, model: Path | None) -> Iterator[tuple[str, Any]]:
    """(what, facts), as far as it comes: `devices` (platform, kind, count), `kernels` (name, or "" and why not; on a CPU
    only), `plan` as `plan.describe` says, if there is a model to plan. Raises PlanError, ModelError, and what jax raises."""
    devices = jax.devices()
    platform = devices[0].platform
    yield "devices", {"platform": platform, "kind": devices[0].device_kind, "count": len(devices)}
    if platform == "cpu" and config.kernels in ("auto", "native"):
        native = native_kernels(Path(config.cache_dir) if config.cache_dir else default_cache_dir())
        yield (
            "kernels",
            {"name": "", "why": native} if isinstance(native, str) else {"name": native.name, "why": ""},
        )
    if model is not None:
        yield "plan", describe(config, model)
