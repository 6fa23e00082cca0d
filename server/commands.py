"""The commands besides `serve`: engine, download, plan, warmup, bench, print-schema. Each is short; what they do is other rooms' work.

jax comes in with `engine.start`, which each command imports when it runs.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine.config import EngineConfig
from ..engine.errors import EngineError
from ..models.errors import ModelError
from . import logs
from .config import ServerConfig
from .console import Console, bytes_text
from .flags import RunConfig
from .keys import read_keys
from .model import find_model, with_adapters
from .options import Options, UsageError
from .tls import certificate_of

OK, CANNOT = 0, 3
Rows = Sequence[tuple[str, str]]


def console_of(run: RunConfig) -> Console:
    """Progress and logs go to stderr: stdout is for results."""
    console = Console(sys.stderr, json_output=run.json_output)
    logs.setup(run.log_level, console.line, json_output=run.json_output)
    return console


def find(config: EngineConfig, run: RunConfig, console: Console) -> Path:
    """Where the model lies, downloaded if need be."""
    return find_model(
        config, run.hub_cache, lambda done, total: console.progress("download", done, total, "B")
    ).path


def engine(config: EngineConfig, run: RunConfig, options: Options) -> int:
    """Serve gRPC until told to stop; under a supervisor, tell it how the start goes."""
    from ..engine.process import ParentLink

    descriptor = options.plain("progress_fd")
    link = None if descriptor is None else ParentLink(descriptor)
    if link is not None:
        link.die_with_parent()
    try:
        return _serve_engine(config, run, options, link)
    except (EngineError, ModelError) as error:
        if link is None:
            raise
        link.failed(str(error))
        return CANNOT


def _serve_engine(config: EngineConfig, run: RunConfig, options: Options, link: Any) -> int:
    from ..engine.follow import follow
    from ..engine.rpc_server import serve
    from ..engine.start import start

    address = None if config.process_id else _address(options)
    console = console_of(run)
    path = Path(given) if (given := options.plain("model_path")) else find(config, run, console)
    config = with_adapters(config, run.hub_cache)

    def progress(phase: str, done: int, total: int) -> None:
        if link is None:
            console.progress(phase, done, total, "B" if phase == "weights" else "")
        else:
            link.report(phase, done, total)

    def ready(at: str) -> None:
        if link is None:
            console.settle()
            console.say(f"Connected: engine for {config.model_id} at {at}")
        else:
            link.ready()

    if address is None:
        follow(config, path, progress, drain_s=options.plain("drain_s"))
        return OK
    core = start(config, path, options.plain("model_sha"), progress)
    try:
        asyncio.run(serve(core, address, drain_s=options.plain("drain_s"), on_ready=ready))
    except OSError as error:
        raise UsageError(str(error)) from error
    return OK


def _address(options: Options) -> str:
    uds, listen = options.plain("uds"), options.plain("listen")
    if (uds is None) == (listen is None):
        raise UsageError("give one of --uds PATH and --listen HOST:PORT: where the engine is to be reached")
    return listen if uds is None else f"unix:{Path(uds).absolute()}"


def download(config: EngineConfig, run: RunConfig) -> int:
    """Fetch a model and print where it lies."""
    console = console_of(run)
    path = find(config, run, console)
    console.settle()
    print(path)
    return OK


def plan(config: EngineConfig, run: RunConfig, options: Options) -> int:
    """Print what a model needs, what it would get and how fast it could be, here or on a topology."""
    console = console_of(run)
    # Nothing of the weights is read: a directory without any can be planned, too.
    path = find(replace(config, load_format="dummy"), run, console)
    config = with_adapters(config, run.hub_cache)
    from ..engine.plan import describe

    def progress(done: int, total: int) -> None:
        console.progress("programs", done, total)

    facts = describe(config, path, options.plain("topology"), bool(options.plain("compile")), progress)
    console.settle()
    if options.plain("json"):
        print(json.dumps({name.replace(" ", "_"): value for name, value in facts.items()}))
    else:
        Console(sys.stdout).table("", [(_without_unit(name), _shown(name, facts)) for name in facts])
    return OK


def _without_unit(name: str) -> str:
    return name.replace(" bytes per", " per").removesuffix(" bytes")


def _shown(name: str, facts: Mapping[str, Any]) -> str:
    value = facts[name]
    if "bytes" in name:
        return bytes_text(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def dry_run(engine: EngineConfig, server: ServerConfig, run: RunConfig, given: Rows) -> int:
    """Print what was `given` and what `serve` would make of it. Of a model on the Hub only its description is fetched."""
    certificate_of(server)
    if server.api_key_file is not None:
        read_keys(server.api_key_file)
    console = console_of(run)
    plans = _asked(engine, run) if run.engines else _planned(engine, server, run, console)
    console.settle()
    shown = Console(sys.stdout, json_output=run.json_output)
    shown.table("set (all others: xlane config show)", given)
    for title, facts in plans.items():
        shown.table(title, [(_without_unit(fact), _shown(fact, facts)) for fact in facts])
    return OK


def _planned(
    engine: EngineConfig, server: ServerConfig, run: RunConfig, console: Console
) -> dict[str, dict[str, Any]]:
    """What each model would be on the devices here."""
    from .several import configs_of

    configs = configs_of(engine, server, run)
    paths = {name: find(replace(one, load_format="dummy"), run, console) for name, one in configs.items()}
    from ..engine.plan import describe

    plans = {name: describe(with_adapters(one, run.hub_cache), paths[name]) for name, one in configs.items()}
    return {"would serve" if len(plans) == 1 else f"would serve {name}": plans[name] for name in plans}


def _asked(engine: EngineConfig, run: RunConfig) -> dict[str, dict[str, Any]]:
    """What the engines that run elsewhere say."""
    from .engines import ask_engines

    states, info = ask_engines(run.engines, engine.model_id)
    asked: dict[str, dict[str, Any]] = {"would ask": {**states}}
    if info is not None:
        asked["would serve"] = {
            "model": info.model_id,
            "lanes": info.lanes,
            "context": info.max_total_tokens,
            "KV bytes": info.kv_bytes,
        }
    return asked


def warmup(config: EngineConfig, run: RunConfig) -> int:
    """Compile everything into the cache directory."""
    console = console_of(run)
    if config.cache_dir is None:
        raise UsageError(
            "--cache-dir none leaves nothing to warm up: give the directory that the server will use"
        )
    path = find(config, run, console)
    config = with_adapters(config, run.hub_cache)
    from ..engine.start import warm

    manifest = warm(config, path, lambda done, total: console.progress("programs", done, total))
    console.settle()
    print(manifest)
    return OK


def bench(config: EngineConfig, run: RunConfig, options: Options) -> int:
    """Measure the engine in this process."""
    console = console_of(run)
    path = find(config, run, console)
    config = with_adapters(config, run.hub_cache)
    from ..engine.bench import main

    return main(config, path, options.of(""))


def print_schema(server: ServerConfig) -> int:
    """Print the OpenAPI document of a server run like this."""
    from .app import create_app
    from .backend import Backend
    from .docs import describe

    print(json.dumps(describe(create_app(Backend(), server), keyed=server.keyed), indent=2))
    return OK
