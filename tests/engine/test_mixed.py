"""Prompts computed in the launches in which other streams get their tokens: what comes of it is what each gets alone."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.engine.conftest import collect, ids, request, run
from tests.support.untrained import loud, untrained_model
from xlane.engine import EngineConfig, EngineStats, Request
from xlane.engine.build import build
from xlane.engine.engine import Engine
from xlane.engine.local import LocalClient
from xlane.models.opened import open_model

SAMPLED = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 7}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = open_model(untrained_model(tmp_path_factory.mktemp("m"), num_hidden_layers=1), weights=False)
    config = EngineConfig(
        model_id="m", kernels="xla", lanes=4, page_tokens=4, max_total_tokens=64, prefill_chunk_tokens=16
    )
    built = build(config, model.config, None)
    engine = Engine(config, model.config, replace(built, params=loud(built.params)))
    yield engine
    engine.stop()


def asked(number: int) -> Request:
    """Prompts of 5 to 40 tokens, greedy and sampled in turn."""
    prompt = [(3 * number + 5 * place + place * place) % 19 for place in range(5 + 9 * (number % 5))]
    return request(prompt, max_tokens=12, **(SAMPLED if number % 2 else {}))


def test_streams_and_prompts_side_by_side_are_what_each_is_alone(engine: Engine) -> None:
    alone = [ids(run(engine, replace(asked(number), cache_salt="alone"))[0]) for number in range(10)]
    before = engine.stats()

    async def staggered() -> list[list[int]]:
        client = LocalClient(engine)

        async def one(number: int) -> list[int]:
            await asyncio.sleep(0.004 * number)
            return ids(await collect(client, replace(asked(number), cache_salt="together")))

        return list(await asyncio.gather(*(one(number) for number in range(10))))

    assert asyncio.run(staggered()) == alone
    after = engine.stats()
    assert after.prefill_tokens - before.prefill_tokens == sum(len(asked(n).prompt_ids) for n in range(10))
    assert after.joins > before.joins
    assert after.compiles_after_ready == 0
    assert after.pages_free == after.pages_total


def test_a_long_prompt_holds_up_no_stream(engine: Engine) -> None:
    """Pieces of four tokens to sixteen: in each turn that computes one, the stream beside it gets a token."""

    async def main() -> tuple[int, int]:
        async def counted(earlier: EngineStats, tokens: int) -> EngineStats:
            """What there is once so many more tokens of prompts are counted: just after tokens were handed over."""
            while (now := engine.stats()).prefill_tokens - earlier.prefill_tokens < tokens:
                await asyncio.sleep(0.001)
            return now

        client, idle = LocalClient(engine), engine.stats()
        stream = client.submit(replace(request([1, 2, 3], max_tokens=60), cache_salt="stream"))
        await anext(stream)
        before = await counted(idle, 3)
        await collect(client, replace(request(list(range(3, 19)) * 3, max_tokens=1), cache_salt="long"))
        after = await counted(before, 48)
        await stream.aclose()
        pieces = sum(after.prefill.device_s.counts) - sum(before.prefill.device_s.counts)
        return pieces, after.steps - before.steps

    pieces, steps = asyncio.run(main())
    assert 3 <= pieces <= 12
    assert steps >= pieces
