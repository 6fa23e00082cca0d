"""`--more-models`: which models that names, and how each is run. Knows options; who is loaded when is `models.py`'s."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from ..engine.config import EngineConfig
from .backend import Backend
from .config import ServerConfig
from .console import Console
from .flags import RunConfig
from .loaded import LoadedModel
from .models import UNASKED, Models, ServedModel
from .options import UsageError


def several(
    engine: EngineConfig,
    server: ServerConfig,
    run: RunConfig,
    backend: Backend,
    console: Console,
    command: Sequence[str] | None = None,
) -> Models:
    """All models of a server of several. Raises UsageError.

    Args:
        engine: how the first is run; the others are run alike.
        server: names the others.
        run: how all of them log.
        backend: the first one's.
        console: shown how far each is.
        command: runs each engine; default this program's own `engine` command.
    """
    served: list[ServedModel] = []
    for name, config in configs_of(engine, server, run).items():
        behind = Backend(run.hub_cache) if served else backend
        if served:
            behind.down(UNASKED, comes_back=True)
        make = partial(LoadedModel, config, run, behind, console, command=command)
        served.append(ServedModel(name, behind, make))
    return Models(
        served,
        most_loaded=server.loaded_models,
        most_waiting=server.max_concurrent_requests,
        wait_s=server.model_wait_s,
        turn_s=server.model_turn_s,
        tell=console.say,
    )


def configs_of(engine: EngineConfig, server: ServerConfig, run: RunConfig) -> dict[str, EngineConfig]:
    """The name of each model and how it is run, the first first. Raises UsageError."""
    first = server.served_model_name or engine.model_id
    if not server.more_models:
        return {first: engine}
    _check(engine, server, run)
    named = [(first, engine.model_id), *_named(server.more_models)]
    share = engine.memory_fraction / min(server.loaded_models, len(named))
    found: dict[str, EngineConfig] = {}
    for name, model_id in named:
        if name in found:
            raise UsageError(f"--more-models: there are two models {name}; NAME=ID gives one another name")
        found[name] = replace(engine, model_id=model_id, memory_fraction=share)
    return found


def _named(models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and id of each."""
    for given in models:
        name, _, model_id = given.rpartition("=")
        yield name or model_id, model_id


def _check(engine: EngineConfig, server: ServerConfig, run: RunConfig) -> None:
    """Refuse what can be of one model only. Raises UsageError."""
    single = {
        "--revision": engine.revision,
        "--draft-model": engine.draft_model,
        "--lora-adapters": ",".join(engine.lora_adapters) or None,
        "--prefix-cache-path": engine.prefix_cache_path,
        "--coordinator": engine.coordinator,
        "--shard-uds-path": run.uds_path,
        "--tokenizer-config-path": server.tokenizer_config_path,
    }
    for option, value in single.items():
        if value is not None:
            raise UsageError(f"{option}={value} is of one model, and --more-models serves several")
