"""The demo model, fetched as a first start fetches it and kept where later starts look."""

from pathlib import Path

import pytest

from xlane.models.demo import default_cache_dir, demo_model


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    return demo_model(default_cache_dir())
