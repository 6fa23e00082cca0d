"""From a configuration and a path to an engine that runs, in this process. What `xlane engine` and `warmup` call.

Of several processes that serve one model process 0 calls `start`, and each other one `follow.follow`. The first to touch jax. Knows files and phases; not where the model came from nor who will ask the engine.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from llguidance import LLTokenizer

from ..models.guidance import guidance_tokenizer
from ..models.tokenizer import TextTokenizer
from ..tpu.runtime import keep_freed_memory
from .build import Progress, build, compile_within, design
from .config import EngineConfig
from .engine import Engine
from .errors import PlanError
from .follow import check_all_built, decisions, end_process, group_address, prepare
from .group import Leader
from .manifest import write_manifest
from .opening import open_served
from .step import Blueprint


def start(
    config: EngineConfig, path: Path, model_sha: str | None = None, progress: Progress | None = None
) -> Engine:
    """Load the model at `path`, compile, and serve. Raises PlanError, ModelError.

    With several processes this is the leader's start, and it waits for all of them.
    """
    if config.process_id != 0:
        raise PlanError(
            f"process {config.process_id} does not take requests: process 0 does, the others follow it"
        )
    prepare(config)
    opened = open_served(config, path)
    leader = None
    if config.processes > 1:
        leader = Leader(group_address(config, bind=True), config.processes, end_process)

    def gather(blueprint: Blueprint) -> None:
        if leader is not None:
            leader.gather(decisions(blueprint))

    def guidance() -> LLTokenizer:
        return guidance_tokenizer(TextTokenizer.from_path(path), opened.config.vocab_size)

    try:
        with _uncollected():
            built = build(config, opened.config, opened.source, progress, gather)
            try:
                check_all_built(built)
                engine = Engine(config, opened.config, built, model_sha, leader, guidance)
            except BaseException:
                built.programs.close()
                raise
    except BaseException:
        if leader is not None:
            leader.close()
        raise
    with contextlib.suppress(OSError):  # a warmed cache may be mounted read-only, and serves as well
        write_manifest(config, built.programs, jax.__version__)
    # What lives now lives for ever: the collector need not look at it again and again while tokens wait.
    gc.collect()
    gc.freeze()
    if built.programs.blueprint.placement.device.platform == "cpu":
        keep_freed_memory(os.environ)
    return engine


def warm(config: EngineConfig, path: Path, progress: Callable[[int, int], None] | None = None) -> Path | None:
    """Compile every program into the cache and write the manifest; weights are not read."""
    prepare(config)
    opened = open_served(config, path, weights=False)

    def report(phase: str, done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)

    blueprint, memory, _ = design(config, opened.config)
    programs, _ = compile_within(config, blueprint, memory, report)
    return write_manifest(config, programs, jax.__version__)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Much is made meanwhile and next to none of it is garbage: the collector would only look at all of it again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
