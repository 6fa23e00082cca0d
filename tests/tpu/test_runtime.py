"""What is set before jax is used: where the user has not set it."""

import ctypes
import os
import subprocess
import sys

import pytest

from xlane.tpu.runtime import keep_freed_memory, set_gpu_defaults, set_tpu_defaults


def test_conditions_become_part_of_the_graph():
    environ: dict[str, str] = {"XLA_FLAGS": "--xla_dump_to=/tmp/x"}
    set_gpu_defaults(environ)
    first, graphs = environ["XLA_FLAGS"].split()
    assert first == "--xla_dump_to=/tmp/x"
    assert {"CONDITIONAL", "WHILE", "FUSION"} <= set(graphs.partition("=")[2].split(","))
    assert environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"


def test_who_is_to_use_half_of_a_gpu_at_most_does_not_take_all_of_it_at_once():
    told = {}
    for fraction in (0.9, 0.45):
        environ: dict[str, str] = {}
        set_gpu_defaults(environ, fraction)
        told[fraction] = environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    assert told == {0.9: None, 0.45: "false"}


def test_the_users_own_settings_stay():
    own = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    environ = dict(own)
    set_gpu_defaults(environ)
    assert environ == own


def test_threads_of_a_tpus_compiler_have_room_for_their_calls():
    environ: dict[str, str] = {"LIBTPU_INIT_ARGS": "--xla_tpu_x=1"}
    set_tpu_defaults(environ)
    first, stack = environ["LIBTPU_INIT_ARGS"].split()
    assert first == "--xla_tpu_x=1"
    assert stack == "--fibers_default_thread_stack_size=4194304"
    set_tpu_defaults(environ)
    assert environ["LIBTPU_INIT_ARGS"].split() == [first, stack]


def test_xla_knows_the_flags():
    """An unknown flag ends the process when the first device is looked at; so does one that does not parse."""
    environ = {**os.environ, "XLA_FLAGS": ""}
    set_gpu_defaults(environ)
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "2", run.stderr


KEPT = """
import ctypes, resource, sys
from xlane.tpu.runtime import keep_freed_memory

malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = malloc(2**24)
        ctypes.memset(block, 1, 2**24)
        free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "keep" in sys.argv:
    assert keep_freed_memory({})
faults(2)
print(faults(10))
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_is_given_back_is_not_mapped_again():
    """16 MB ten times are 40,960 pages of 4 kB; kept, they are those of the first time."""
    faults = {}
    for how in ("keep", "give"):
        environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
        run = subprocess.run(
            [sys.executable, "-c", KEPT, how], env=environ, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        faults[how] = int(run.stdout)
    assert faults["keep"] < faults["give"] / 10


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"])
def test_what_the_user_says_of_memory_stays(name: str):
    assert not keep_freed_memory({name: "1"})
