"""One of several processes that serve a model: how they meet and agree, and what those other than the leader do.

Knows processes and launches; what is launched is the leader's business.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from ..sharding.processes import ProcessError, all_equal, join_processes
from ..tpu.runtime import keep_freed_memory, set_gpu_defaults, set_tpu_defaults, use_compile_cache
from .build import Built, Progress, build
from .config import EngineConfig, programs_folder
from .errors import PlanError
from .group import Follower
from .identity import depends_on
from .launcher import Launcher
from .opening import open_served
from .step import Blueprint
from .turn import Size

logger = logging.getLogger(__name__)

GROUP_BROKEN = 5
"""Exit code of a process that lost another one of its group."""
AHEAD = 2
"""Launches that a follower has under way before it waits for the oldest."""
NEWS_S = 5.0
"""How long a failed launch waits for the news that explains it."""


def prepare(config: EngineConfig) -> None:
    """Set up what jax runs on and wait for the other processes. Must come before anything touches a device. Raises PlanError."""
    set_gpu_defaults(os.environ, config.memory_fraction)
    set_tpu_defaults(os.environ)
    try:
        join_processes(config.coordinator, config.processes, config.process_id)
    except ProcessError as error:
        raise PlanError(str(error)) from error
    keep_programs(config)


def keep_programs(config: EngineConfig) -> None:
    """Have what is compiled kept where it is to be. Raises PlanError."""
    try:
        use_compile_cache(programs_folder(config))
    except OSError as error:
        raise PlanError(
            f"--cache-dir {config.cache_dir} cannot be written, {error.filename}: {error.strerror}; choose another one, or none"
        ) from error


def follow(
    config: EngineConfig, path: Path, progress: Progress | None = None, *, drain_s: float = 25.0
) -> None:
    """Be a process other than 0: load this process's part of the model and make the leader's launches until it ends.

    After SIGTERM it goes on for `drain_s`, in which a leader that was told the same ends. Call it in the main thread. Raises
    PlanError, ModelError, and EngineLost if there is no leader. If the group breaks later, the process exits.
    """
    if os.getpid() == 1:  # The first process of a container ends by no signal that it does not handle.
        _end_when_told(config.process_id, 0.0)
    prepare(config)
    opened = open_served(config, path)
    follower = Follower(group_address(config), config.process_id, end_process)

    def join(blueprint: Blueprint) -> None:
        follower.join(decisions(blueprint))

    built = build(config, opened.config, opened.source, progress, join)
    check_all_built(built)
    launcher = Launcher(built.programs, built.params)
    if built.programs.blueprint.placement.device.platform == "cpu":
        keep_freed_memory(os.environ)
    under_way: deque[jax.Array] = deque()

    def launch(size: Size, plan: np.ndarray, mask: np.ndarray | None) -> None:
        under_way.append(launcher.launch(size, plan, mask).result)
        if len(under_way) > AHEAD:
            under_way.popleft().block_until_ready()

    _end_when_told(config.process_id, drain_s)
    try:
        follower.run(launch)
    except Exception as error:
        # Most often the leader is gone in the middle of a launch: give the news of that a moment to come first.
        logger.exception("a launch failed")
        time.sleep(NEWS_S)
        end_process(f"process {config.process_id} could not make a launch: {error}")


def _end_when_told(process_id: int, after_s: float) -> None:
    """From now on SIGTERM ends this process after so many seconds: without it the leader's requests could not end."""

    def told(number: int, frame: object) -> None:
        message = f"process {process_id} was told to end, and the leader goes on"
        ending = threading.Timer(after_s, end_process, (message,))
        ending.daemon = True  # the leader may end first
        ending.start()

    signal.signal(signal.SIGTERM, told)


def decisions(blueprint: Blueprint) -> dict[str, str]:
    """What every process of a group must have decided alike."""
    depends = depends_on(blueprint, jax.__version__) | {"xlane": version("xlane")}
    parts = [(name, value if isinstance(value, dict) else {"": value}) for name, value in depends.items()]
    return {f"{name}.{part}".rstrip("."): str(x) for name, values in parts for part, x in values.items()}


def check_all_built(built: Built) -> None:
    """Wait until all processes have loaded and compiled. Raises PlanError if they came to different programs."""
    if not all_equal(str(decisions(built.programs.blueprint))):
        raise PlanError(
            "the processes' compilers ask for different amounts of memory, so their KV pools differ; give --kv-bytes"
        )


def group_address(config: EngineConfig, *, bind: bool = False) -> str:
    """Where the leader tells its followers what to launch: for them, or to listen on."""
    host, _, port = (config.coordinator or "").rpartition(":")
    if bind and host not in ("localhost", "127.0.0.1", "[::1]"):
        host = "[::]"  # the coordinator's name may stand for an address that is not this host's own
    return f"{host}:{config.group_port or int(port) + 1}"


def end_process(message: str) -> None:
    """The group is broken: say why, and go, whatever this process's threads wait for."""
    logger.critical("%s: this process ends", message)
    sys.stderr.flush()
    os._exit(GROUP_BROKEN)
