"""The model that is to be served, opened with its adapters, or refused before anything large is begun. Knows options and files."""

from pathlib import Path

from ..models.opened import OpenedModel, open_model
from .config import EngineConfig
from .errors import PlanError


def open_served(config: EngineConfig, path: Path, *, weights: bool = True) -> OpenedModel:
    """The model at `path` with the adapters that are asked for, opened. Raises PlanError, ModelError."""
    if config.adapter_slots and config.processes > 1:
        raise PlanError(
            f"--lora-adapters slots={config.adapter_slots}: the {config.processes} processes of one engine take no adapters while "
            "they serve: name them at the start"
        )
    if not config.adapter_slots and any(name.startswith("rank=") for name in config.lora_adapters):
        raise PlanError(
            "--lora-adapters rank=N is of adapters that are loaded while serving: say slots=N too"
        )
    return open_model(
        path,
        weights=weights and config.load_format != "dummy",
        adapters=config.adapters,
        adapter_slots=config.adapter_slots,
        adapter_rank=config.adapter_rank,
    )
