"""Several processes as one: each owns some of the devices, and all of them run the same program. Functions that are called
before anything touches a device. Knows how processes find each other; not what they compute.
"""

import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

SHUTDOWN_S = 15
"""How long a process that ends waits for the others to end too."""


class ProcessError(Exception):
    """The processes cannot work together as asked."""


def join_processes(coordinator: str | None, processes: int, process_id: int) -> None:
    """Wait until all processes are there; from then on `jax.devices()` are everybody's. One process needs no one.

    `coordinator` is a HOST:PORT of process 0. Raises ProcessError.
    """
    if processes == 1 and process_id == 0:
        return
    if not 0 <= process_id < processes:
        raise ProcessError(f"process {process_id} of {processes}: ids go from 0 to {processes - 1}")
    if coordinator is None:
        raise ProcessError(
            f"{processes} processes must know where process 0 is: give --coordinator HOST:PORT"
        )
    if not coordinator.rpartition(":")[2].isdecimal():
        raise ProcessError(f"--coordinator {coordinator} has no port: give HOST:PORT")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for a notice that nobody here reads, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, processes, process_id, shutdown_timeout_seconds=SHUTDOWN_S)
    except RuntimeError as error:
        raise ProcessError(
            f"process {process_id} could not meet the others at {coordinator}: {error}"
        ) from error


def least_of_all(size: int) -> int:
    """The smallest of the sizes that the processes bring, rounded down to MiB. Waits for all."""
    return size if jax.process_count() == 1 else min(_from_all(size >> 20)) << 20


def all_equal(text: str) -> bool:
    """Do all processes bring the same? Waits for all."""
    return jax.process_count() == 1 or len(set(_from_all(zlib.crc32(text.encode()) >> 1))) == 1


def _from_all(value: int) -> list[int]:
    """The int32 that each process brings."""
    return multihost_utils.process_allgather(np.int32(value)).tolist()
