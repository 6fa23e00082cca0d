"""What must be set before jax is used: the persistent compile cache. Functions that are called, never import effects."""

from pathlib import Path

import jax


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
