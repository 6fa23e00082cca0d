"""Where the model to serve lies: on this machine, on the Hub, or the demo out of its wheel. Knows no file formats."""

from dataclasses import replace
from pathlib import Path

from ..engine.config import ADAPTER_PLACES, EngineConfig
from ..models.demo import default_cache_dir, demo_model
from ..models.hub import Progress, ResolvedModel, resolve, resolve_adapter

DEMO = "demo"


def find_model(
    config: EngineConfig, hub_cache: str | None, progress: Progress | None = None, *, ask: bool = True
) -> ResolvedModel:
    """The model on this machine, downloaded if need be, and if the Hub is to be asked. Raises HubError."""
    if config.model_id == DEMO:
        kept = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
        return ResolvedModel(demo_model(kept, progress), None, "gguf")
    weights = config.load_format != "dummy"
    return resolve(
        config.model_id, config.revision, cache_dir=hub_cache, progress=progress, weights=weights, ask=ask
    )


def with_adapters(config: EngineConfig, hub_cache: str | None) -> EngineConfig:
    """The same with every adapter on this machine, downloaded if need be. Raises HubError."""
    found = (
        f"{name.partition('@')[0]}={resolve_adapter(place, hub_cache)}" for name, place in config.adapters
    )
    places = (said for said in config.lora_adapters if said.partition("=")[0] in ADAPTER_PLACES)
    return replace(config, lora_adapters=(*found, *places))
