"""`--more-models`: which models that names, and how each is run. Knows options; who is loaded when is `models.py`'s."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from ..engine.config import EngineConfig
from .backend import Backend
from .config import ServerConfig
from .console import Console
from .flags import RunConfig
from .loaded import LoadedModel
from .models import Models, ServedModel
from .options import UsageError


def several(
    engine: EngineConfig,
    server: ServerConfig,
    run: RunConfig,
    backend: Backend,
    console: Console,
    command: Sequence[str] | None = None,
) -> Models | None:
    """All models of this server, or None if there is one only. Raises UsageError.

    Args:
        engine: how the first is run; the others are run alike.
        server: names the others.
        run: how all of them log.
        backend: the first one's.
        console: shown how far each is.
        command: runs each engine; default this program's own `engine` command.
    """
    if not server.more_models:
        return None
    _check(engine, server, run)
    names = [(server.served_model_name or engine.model_id, engine.model_id), *_named(server.more_models)]
    for name, _ in names:
        if [other for other, _ in names].count(name) > 1:
            raise UsageError(f"--more-models: there are two models {name}; NAME=ID gives one another name")
    most = min(server.loaded_models, len(names))
    shared = replace(engine, memory_fraction=engine.memory_fraction / most)

    def make(model_id: str, behind: Backend) -> Callable[[], LoadedModel]:
        config = replace(shared, model_id=model_id)
        return partial(LoadedModel, config, run, behind, console, command=command)

    served: list[ServedModel] = []
    for name, model_id in names:
        behind = Backend() if served else backend
        if served:
            behind.down("not loaded", comes_back=True)
        served.append(ServedModel(name, behind, make(model_id, behind)))
    return Models(served, most_loaded=most, wait_s=server.model_wait_s, tell=console.say)


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
        "--prefix-cache-path": engine.prefix_cache_path,
        "--coordinator": engine.coordinator,
        "--shard-uds-path": run.uds_path,
        "--tokenizer-config-path": server.tokenizer_config_path,
    }
    for option, value in single.items():
        if value is not None:
            raise UsageError(f"{option}={value} is of one model, and --more-models serves several")
