"""Engines of tiny models, built once a module and shared by its tests that only ask them."""

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.support.few_programs import few_programs
from tests.support.tiny import tiny_model
from xlane.engine import EngineConfig, Request, SamplingParams, StepOutput
from xlane.engine.engine import Engine
from xlane.engine.kernels.native.build import COMPILERS
from xlane.engine.kernels.native.calls import NativeKernels, native_kernels
from xlane.engine.local import LocalClient
from xlane.models.opened import open_model

_ids = itertools.count()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """One event loop for all tests of a file: gRPC's queue is the process's, and late news for a closed loop hits the next."""
    yield
    await asyncio.sleep(0.2)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    if not any(shutil.which(name) for name in COMPILERS):
        pytest.skip(f"needs a C++ compiler: one of {', '.join(COMPILERS)}")
    loaded = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    assert isinstance(loaded, NativeKernels), loaded
    return loaded


@pytest.fixture(scope="module")
def engine_of(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Build (once per set of options) an engine of a tiny model. Of few programs, see there for `alone`."""
    built: dict[tuple, Engine] = {}
    cache = str(tmp_path_factory.getbasetemp().parent / "kernels")

    def make(kind: str = "llama-gqa-tied", *, alone: bool = False, **options) -> Engine:
        options = {
            "lanes": 4, "page_tokens": 4, "max_total_tokens": 96, "prefill_chunk_tokens": 16, "kernels": "xla", **options,
        }  # fmt: skip
        key = (kind, alone, *sorted(options.items()))
        if key not in built:
            opened = open_model(tiny_model(kind, models))
            config = EngineConfig(model_id=kind, cache_dir=cache, **options)
            with few_programs(alone=alone):
                built[key] = Engine.build(config, opened.config, opened.source)
        return built[key]

    yield make
    for engine in built.values():
        engine.stop()


def request(prompt: list[int], **sampling) -> Request:
    """A request with a fresh id; greedy unless told otherwise."""
    sampling = {"max_tokens": 8, "temperature": 0.0, **sampling}
    return Request(id=f"test-{next(_ids)}", prompt_ids=tuple(prompt), sampling=SamplingParams(**sampling))


async def collect(client: LocalClient, asked: Request) -> list[StepOutput]:
    """Every output of one request."""
    return [output async for output in client.submit(asked)]


def ids(outputs: list[StepOutput]) -> list[int]:
    """The generated tokens."""
    return [token.id for output in outputs for token in output.tokens]


def run(engine: Engine, *asked: Request) -> list[list[StepOutput]]:
    """Run requests at once and return each one's outputs."""

    async def all_at_once() -> list[list[StepOutput]]:
        client = LocalClient(engine)
        return list(await asyncio.gather(*(collect(client, one) for one in asked)))

    return asyncio.run(all_at_once())
