"""A model with its engine's process: what runs when it is unloaded."""

import asyncio
import io
import sys
from pathlib import Path

import pytest

from xlane.engine import EngineConfig, FinishReason, Request, SamplingParams
from xlane.server.backend import Backend
from xlane.server.console import Console
from xlane.server.flags import RunConfig
from xlane.server.loaded import LoadedModel

from ..support.fake_session import fake_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_what_runs_in_an_engine_that_is_unloaded_ends_and_looks_for_no_other(tmp_path: Path):
    backend = Backend()
    model = LoadedModel(
        EngineConfig(model_id=str(fake_model(tmp_path / "model"))), RunConfig(), backend, Console(io.StringIO()),
        command=[sys.executable, "-m", "tests.support.fake_core", "--turn-s", "0.01", "--drain-s", "0"],
    )  # fmt: skip
    await model.load()
    request = Request(id="r", prompt_ids=(1, 2), sampling=SamplingParams(max_tokens=3000))
    outputs = backend.serving().engine.submit(request)
    await anext(outputs)
    unloading = asyncio.ensure_future(model.unload())
    assert [output.finish_reason async for output in outputs][-1] is FinishReason.ABORT
    await unloading
