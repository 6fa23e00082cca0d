"""The parts of streaming that no client shows: stalled readers, engines that end oddly."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from xlane.engine import EngineClient, FinishReason, Request, SamplingParams, StepOutput, TokenOutput
from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.detokenize import Detokenizer
from xlane.server.errors import Incomplete
from xlane.server.generate import Ending, Progress, Run, run_all
from xlane.server.metrics import Metrics

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine


class Scripted(FakeEngine):
    """Answers every request with the same steps."""

    def __init__(self, *steps: tuple[bytes, FinishReason | None]) -> None:
        super().__init__()
        self._steps = steps

    async def submit(self, request: Request) -> AsyncIterator[StepOutput]:  # type: ignore[override]
        for ids, reason in self._steps:
            yield StepOutput(request.id, tuple(TokenOutput(i, -1.0) for i in ids), reason)


def outcome(engine: FakeEngine, count: int = 1) -> list[Progress]:
    """All progress of some equal requests."""

    async def main() -> list[Progress]:
        runs = [
            Run(
                Request(id=str(i), prompt_ids=(1,), sampling=SamplingParams(max_tokens=9)),
                Detokenizer(ByteTokenizer()),
            )
            for i in range(count)
        ]
        return [p async for p in run_all(cast(EngineClient, engine), runs, Metrics())]

    return asyncio.run(main())


def test_an_end_without_a_token():
    *_, last = outcome(Scripted((b"ab", None), (b"", FinishReason.LENGTH)))
    assert last.done is not None
    assert (last.done.ending, last.done.text, last.done.tokens) == (Ending.LENGTH, "ab", 2)


def test_an_end_without_a_token_is_an_event_too():
    engine, backend = Scripted((b"ab", None), (b"", FinishReason.LENGTH)), Backend()
    backend.ready(cast(EngineClient, engine), ByteTokenizer(), engine.info_value)
    with TestClient(create_app(backend, ServerConfig())) as client:
        text = client.post("/generate_stream", json={"inputs": "a"}).text
    assert text.count("data: ") == 3
    assert '"special":true},"generated_text":"ab"' in text


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("steps", [[], [(b"a", None)], [(b"a", FinishReason.ABORT)]])
def test_a_sequence_without_an_end_is_an_error(steps: list[Any], count: int):
    with pytest.raises(Incomplete):
        outcome(Scripted(*steps), count)


def test_sequences_side_by_side_keep_their_own_order():
    progress = outcome(Scripted((b"a", None), (b"b", None), (b"c", FinishReason.STOP)), 4)
    for choice in range(4):
        own = [p for p in progress if p.choice == choice]
        assert [t.text for p in own for t in p.tokens] == ["a", "b", "c"]
        assert own[-1].done is not None
        assert own[-1].done.text == "ab"
