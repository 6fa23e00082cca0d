"""What every test runs under: the CPU, eight simulated devices, strict arrays, no network. Set before jax is imported.

Everything is set through the environment, so engines started as child processes run under the same rules.
"""

import gc
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xlane.models.kernels import Kernels

SIMULATED_DEVICES = 8

_RULES = {
    "JAX_PLATFORMS": "cpu",
    # The second line: compile in haste. A suite compiles thousands of small programs and runs each a few times; made
    # with LLVM's passes, in 32 pieces each, they would take several times as long, and more mappings than a process has.
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={SIMULATED_DEVICES} "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0",
    # A float that silently becomes float64, or a [D] that silently meets a [T, D], is a bug in a served model.
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # The same small programs are compiled by many tests and by every run.
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"xlane-tests-{os.getuid()}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else its import asks the network what models cost
    "LANGSMITH_TRACING": "false",
    "TOKENIZERS_PARALLELISM": "false",
    # torch, the reference, spins between its threads: beside anything else that costs ten times the work itself.
    "OMP_NUM_THREADS": "1",
}


def _apply(rules: Mapping[str, str]) -> None:
    for name, value in rules.items():
        if name == "XLA_FLAGS":
            value = f"{os.environ.get(name, '')} {value}".strip()
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)


_apply(_RULES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: begun at the end, one of them would keep one processor while others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_go() -> Iterator[None]:
    """Free what a module compiled. Each program takes some hundred memory mappings, and a process has 65,530: a suite
    that kept them all would end in LLVM's abort."""
    yield
    if "jax" in sys.modules:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def one_device_env() -> dict[str, str]:
    """The environment for a child process that should see one device, as on a user's machine, and compiles in haste."""
    return {**os.environ, "XLA_FLAGS": re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"])}


@pytest.fixture(params=["xla", "native"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Kernels":
    """Both kernels of a CPU."""
    from xlane.engine.kernels.native.calls import native_kernels
    from xlane.models.attention import XlaKernels

    if request.param == "xla":
        return XlaKernels("cpu")
    native = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    if isinstance(native, str):
        pytest.skip(native)
    return native
