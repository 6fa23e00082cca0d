"""Engines of tiny models here too."""

from tests.engine.conftest import engine_of, models

__all__ = ["engine_of", "models"]
