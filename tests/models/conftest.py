"""What this room's tests share: the demo model, fetched as a first start fetches it and kept where later starts look, and both
kernels of a CPU."""

from pathlib import Path

import pytest

from xlane.engine.kernels.native import native_kernels
from xlane.models.attention import XlaKernels
from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.kernels import Kernels


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    return demo_model(default_cache_dir())


@pytest.fixture(params=["xla", "native"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if request.param == "xla":
        return XlaKernels("cpu")
    native = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    if isinstance(native, str):
        pytest.skip(native)
    return native
