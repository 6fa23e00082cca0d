"""What this machine computes with, and whether models fit on it: found out without loading them, for `xlane doctor`.

Looking can take long, hang or kill the process, where a driver is broken or another process holds the chip; so it is told
piece by piece. Who looks in a process of its own keeps what was told.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ..models.demo import default_cache_dir
from ..models.errors import ModelError
from .config import EngineConfig
from .errors import EngineError
from .kernels.native.calls import native_kernels
from .plan import describe


def look(config: EngineConfig, models: Mapping[str, tuple[EngineConfig, Path]]) -> Iterator[tuple[str, Any]]:
    """(what, facts), as far as it comes: `devices` (platform, kind, count), `kernels` (name, or "" and why not; on a CPU
    only), and of each model, by its name, `fit` as `plan.describe` says or `unfit` and why. Raises what jax raises.
    `config` is how all of them are run."""
    devices = jax.devices()
    platform = devices[0].platform
    yield "devices", {"platform": platform, "kind": devices[0].device_kind, "count": len(devices)}
    if platform == "cpu" and config.kernels in ("auto", "native"):
        native = native_kernels(Path(config.cache_dir) if config.cache_dir else default_cache_dir())
        yield (
            "kernels",
            {"name": "", "why": native} if isinstance(native, str) else {"name": native.name, "why": ""},
        )
    for name, (one, path) in models.items():
        try:
            yield "fit", {**describe(one, path), "name": name}
        except (EngineError, ModelError) as error:
            yield "unfit", {"name": name, "why": str(error)}
