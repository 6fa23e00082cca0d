"""What this room's tests share: the demo model, fetched as a first start fetches it and kept where later starts look."""

from pathlib import Path

import pytest

from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    return demo_model(default_cache_dir())


@pytest.fixture(scope="module")
def demo(demo_gguf: Path) -> TextTokenizer:
    return TextTokenizer.from_path(demo_gguf)
