"""What must be set before jax is used: XLA's flags, the persistent compile cache; and how the process keeps memory while it is.
Functions that are called, never import effects."""

import ctypes
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import jax

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of malloc.h."""
_FIBER_STACK_BYTES = 4 * 2**20
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


def set_gpu_defaults(environ: MutableMapping[str, str], memory_fraction: float = 1.0) -> None:
    """Before the first device is looked at: how XLA is to use a GPU, where the user has not said it. Without one it means
    nothing.

    Conditions and loops become part of the step's CUDA graph. Otherwise the host waits at each of them until the device
    has come there: a launch returns when its step is nearly over, and the host's own work comes on top of it.
    """
    flags = environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_command_buffer" not in flags:
        environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer={_GRAPHS}".strip()
    # XLA takes so much of the device at once; what the engine may use of it is its own plan's business.
    environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if memory_fraction <= 0.5:  # Others are to have the rest, so it is taken as it is needed.
        environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def set_tpu_defaults(environ: MutableMapping[str, str]) -> None:
    """Before libtpu is loaded: how it is to work, where the user has not said it. Without libtpu it means nothing.

    Its compiler overflows the small stacks that its threads have by default, now and then, while it writes code for
    SparseCores: two of five times with one layer of an 8B model on a v6e.
    """
    flags = environ.get("LIBTPU_INIT_ARGS", "")
    if "fibers_default_thread_stack_size" not in flags:
        environ["LIBTPU_INIT_ARGS"] = (
            f"{flags} --fibers_default_thread_stack_size={_FIBER_STACK_BYTES}".strip()
        )


def use_compile_cache(directory: Path | None) -> None:
    """Keep every compiled program in `directory`; None keeps none.

    jax keys an entry by the program itself, the compiler's version and the device, so models and versions share one
    directory without meeting.
    """
    if directory is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # XLA's own autotuning cache would put the directory's path into every key: a cache warmed here and mounted there
    # would be of no use. What was autotuned is in the compiled programs.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # A program's text is read by the version that wrote it: it need not be what an older one would understand.
    jax.config.update("jax_export_ignore_forward_compatibility", True)


def keep_freed_memory(environ: Mapping[str, str]) -> bool:
    """Large blocks of memory come from the process's own heaps and go back to them, where its C library (glibc) can be told so and
    the user has not said it. Says whether it could. For good, and for the whole process.

    Each launch on a CPU takes its temporaries anew: from pages that the kernel maps, fills with zeros and takes back, some
    thousands a step, or from those of the launch before.
    """
    if any(name in environ for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")):
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    return tell is not None and bool(tell(_MMAP_MAX, 0) and tell(_TRIM_THRESHOLD, 2**31 - 1))
