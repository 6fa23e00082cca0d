"""`--engine`: what can be said beside it, and how the engines it names are, for those who ask before they serve.

Knows options. Engines are asked over gRPC, which is imported for that only.
"""

import asyncio

from ..engine.address import check_address
from ..engine.request import EngineInfo
from .options import Options, UsageError

READ_HERE = ("engine.model_id", "engine.revision", "engine.cache_dir")
"""What the front needs of a model's options: where its tokenizer is."""
OF_OUR_ENGINE = ("run.uds_path", "server.more_models", "server.loaded_models")
"""What else only has a meaning for engines that we start."""


def check_engines(options: Options) -> None:
    """Refuse what engines that run elsewhere decide, by name. Raises UsageError."""
    engines = options.of("run")["engines"]
    given = options.origins["run.engines"]
    for address in engines:
        try:
            check_address(address)
        except ValueError as error:
            raise UsageError(f"{given}: {error}") from None
    if len({*engines}) < len(engines):
        raise UsageError(f"{given} names an engine twice: {', '.join(engines)}")
    for target, origin in options.origins.items():
        if target in OF_OUR_ENGINE:
            raise UsageError(f"{origin} is about engines that this server starts, and {given} names others")
        if target.startswith("engine.") and target not in READ_HERE:
            raise UsageError(
                f"{origin} is for the engines of {given} to be started with: give it to `xlane engine`"
            )


def ask_engines(engines: tuple[str, ...], model_id: str) -> tuple[dict[str, str], EngineInfo | None]:
    """How the engine at each address is, and what those that answer serve together."""
    return asyncio.run(_ask(engines, model_id))


async def _ask(engines: tuple[str, ...], model_id: str) -> tuple[dict[str, str], EngineInfo | None]:
    from ..engine.fleet import Fleet

    fleet = Fleet(engines, model_id)
    try:
        await fleet.survey()
        return {replica.address: replica.told for replica in fleet.all}, fleet.info
    finally:
        await fleet.close()
