"""The whole engine on tiny models: tokens equal transformers', whatever shares the batch, however memory is short."""

import asyncio
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.conftest import collect, ids, request, run
from tests.support.few_programs import few_programs
from tests.support.tiny import hf_greedy, hf_logits, tiny_model
from xlane.engine import (
    EngineConfig,
    FinishReason,
    InvalidRequest,
    LogprobsMode,
    Overloaded,
    Request,
    RequestFailed,
    SamplingParams,
)
from xlane.engine.engine import Engine
from xlane.engine.local import LocalClient
from xlane.models.opened import open_model

pytestmark = pytest.mark.slow

PROMPTS = [
    np.random.default_rng(seed).integers(3, 131, size).tolist()
    for seed, size in enumerate((5, 40, 1, 17, 33, 8))
]


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [("llama-gqa-tied", "xla"), ("llama-gqa-tied", "native"), ("mistral-window", "native")],
)
def test_greedy_tokens_equal_transformers(engine_of, models, kind: str, kernels: str) -> None:
    engine = engine_of(kind, kernels=kernels)
    path = tiny_model(kind, models)
    outputs = run(engine, *(request(prompt, max_tokens=12) for prompt in PROMPTS))
    for prompt, output in zip(PROMPTS, outputs):
        assert ids(output) == hf_greedy(path, prompt, 12)
        assert [step.finish_reason for step in output] == [None] * (len(output) - 1) + [FinishReason.LENGTH]


def test_nothing_compiles_after_ready(engine_of) -> None:
    engine = engine_of()
    run(
        engine,
        *(request(prompt, max_tokens=20, temperature=1.0, top_k=5, logprobs=True) for prompt in PROMPTS),
    )
    assert engine.stats().compiles_after_ready == 0


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_same_seed_same_tokens_alone_or_among_fifteen_others(engine_of, kernels: str) -> None:
    engine = engine_of(kernels=kernels, lanes=16, prefill_chunk_tokens=8, alone=True)
    rng = np.random.default_rng(7)

    def ours() -> Request:
        return request(PROMPTS[1], max_tokens=24, temperature=0.9, top_p=0.95, seed=1234567890123)

    others = [
        request(rng.integers(3, 131, rng.integers(1, 60)).tolist(), max_tokens=int(rng.integers(1, 30)), temperature=1.0, seed=i)
        for i in range(15)
    ]  # fmt: skip
    alone = ids(run(engine, ours())[0])
    among = ids(run(engine, *others[:8], ours(), *others[8:])[8])
    assert alone == among
    other_seed = request(PROMPTS[1], max_tokens=24, temperature=0.9, top_p=0.95, seed=1)
    assert ids(run(engine, other_seed)[0]) != alone


def test_a_stop_token_ends_the_sequence_and_is_its_last_token(engine_of, models) -> None:
    engine = engine_of()
    expected = hf_greedy(tiny_model("llama-gqa-tied", models), PROMPTS[0], 12)
    stop = expected[5]
    (output,) = run(engine, request(PROMPTS[0], max_tokens=12, stop_ids=(stop, 0)))
    assert ids(output) == expected[: expected.index(stop) + 1]
    assert output[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("least", [1, 6, 12])
def test_no_stop_token_before_the_least_length_however_the_rest_is_made(engine_of, least: int) -> None:
    """Half of the vocabulary would stop: until then it is never chosen, and from then on it soon is."""
    engine, stops = engine_of(), tuple(range(4, 131, 4))
    how = {"max_tokens": 40, "temperature": 1.0, "stop_ids": stops, "min_tokens": least}
    outputs = run(engine, *(request(p, seed=seed, **how) for seed, p in enumerate(PROMPTS)))
    for seed, (prompt, output) in enumerate(zip(PROMPTS, outputs)):
        made = ids(output)
        assert not set(made[:least]) & set(stops)
        assert made[-1] in stops
        resumed = Request(
            id="rest",
            prompt_ids=tuple(prompt),
            sampling=request(prompt, seed=seed, **how).sampling,
            resume_ids=tuple(made[: len(made) // 2]),
        )
        assert ids(run(engine, resumed)[0]) == made[len(made) // 2 :]


def test_the_first_token_may_be_the_last(engine_of) -> None:
    (output,) = run(engine_of(), request(PROMPTS[0], max_tokens=1))
    assert len(ids(output)) == 1
    assert output[-1].finish_reason is FinishReason.LENGTH


def test_max_total_tokens_bounds_the_output(engine_of) -> None:
    engine = engine_of()
    (output,) = run(engine, request(PROMPTS[1], max_tokens=1000))
    assert len(ids(output)) == engine.info.max_total_tokens - len(PROMPTS[1])


def test_memory_pressure_preempts_and_nothing_changes(engine_of) -> None:
    roomy = engine_of()
    expected = [ids(output) for output in run(roomy, *(request(p, max_tokens=40) for p in PROMPTS))]
    seeded = [ids(output) for output in run(roomy, *_sampled())]
    page = 2 * 2 * 2 * 4 * 16 * 4
    tight = engine_of(kv_bytes=30 * page)
    assert tight.info.pages == 30
    assert [ids(output) for output in run(tight, *(request(p, max_tokens=40) for p in PROMPTS))] == expected
    assert [ids(output) for output in run(tight, *_sampled())] == seeded
    assert tight.stats().preemptions > 0
    assert tight.stats().pages_free == 30


SHAPED = [
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"logit_bias": tuple((token, 2.0) for token in range(3, 131, 5))},
    {"min_tokens": 19, "stop_ids": tuple(range(3, 131, 5))},
    {"watermark": True},
]
"""What changes logits and could depend on where a sequence was interrupted."""


def _sampled() -> list[Request]:
    return [
        request(p, max_tokens=40, temperature=1.0, seed=i, **SHAPED[i % len(SHAPED)])
        for i, p in enumerate(PROMPTS)
    ]


def test_a_bias_is_the_only_difference_between_two_engines_answers(engine_of, models) -> None:
    """Greedy with biases equals the largest of transformers' logits with the biases added."""
    bias = {token: 1.5 * (-1) ** token for token in range(0, 131, 2)} | {7: -3.0}
    outputs = run(
        engine_of(), *(request(p, max_tokens=6, logit_bias=tuple(bias.items())) for p in PROMPTS[:3])
    )
    path, shift = tiny_model("llama-gqa-tied", models), np.zeros(131, np.float32)
    shift[list(bias)] = list(bias.values())
    for prompt, output in zip(PROMPTS, outputs):
        text = list(prompt)
        for _ in range(6):
            text.append(int((hf_logits(path, text)[-1] + shift).argmax()))
        assert ids(output) == text[len(prompt) :]


@pytest.mark.parametrize("given", [1, 7, 19])
@pytest.mark.parametrize("shaped", SHAPED, ids=lambda shaped: next(iter(shaped)))
def test_resumed_requests_go_on_as_if_nothing_had_happened(engine_of, given: int, shaped: dict) -> None:
    engine = engine_of()
    whole = request(PROMPTS[3], max_tokens=20, temperature=1.0, seed=3, presence_penalty=1.0, **shaped)
    expected = ids(run(engine, whole)[0])
    rest = Request(
        id="rest", prompt_ids=whole.prompt_ids, sampling=whole.sampling, resume_ids=tuple(expected[:given])
    )
    assert ids(run(engine, rest)[0]) == expected[given:]


@pytest.mark.parametrize("mode", LogprobsMode)
def test_logprobs_equal_transformers(engine_of, models, mode: LogprobsMode) -> None:
    temperature = 0.7
    asked = request(
        PROMPTS[3],
        max_tokens=6,
        temperature=temperature,
        seed=5,
        logprobs=True,
        top_logprobs=4,
        logprobs_mode=mode,
    )
    (output,) = run(engine_of(), asked)
    path, text = tiny_model("llama-gqa-tied", models), list(PROMPTS[3])
    for token in (token for step in output for token in step.tokens):
        logits = hf_logits(path, text)[-1] / (temperature if mode is LogprobsMode.PROCESSED else 1.0)
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        best = np.argsort(-logprobs)[:4]
        assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-4)
        assert [top for top, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(logprobs[best].tolist(), abs=1e-4)
        text.append(token.id)


def test_a_long_prompt_does_not_hold_up_a_running_stream(engine_of) -> None:
    """Decode never waits for more than one chunk: while 80 prompt tokens are computed in pieces, the running
    stream gets a token each turn."""
    engine = engine_of()

    async def main() -> list[str]:
        client, order = LocalClient(engine), []

        async def watch(name: str, asked: Request) -> None:
            async for output in client.submit(asked):
                order.extend(name for _ in output.tokens)

        first = asyncio.create_task(watch("running", request(PROMPTS[0], max_tokens=60)))
        while not order:
            await asyncio.sleep(0.001)
        start = len(order)
        await asyncio.gather(first, watch("long", request([5] * 80, max_tokens=2)))
        return order[start:]

    order = asyncio.run(main())
    assert order.index("long") >= 2


def test_a_closed_stream_frees_its_lane(engine_of) -> None:
    engine = engine_of()

    async def main() -> int:
        stream = LocalClient(engine).submit(request(PROMPTS[0], max_tokens=80))
        await anext(stream)
        before = engine.stats().steps
        await stream.aclose()
        while engine.stats().lanes_active:
            await asyncio.sleep(0.001)
        return engine.stats().steps - before

    # Two steps, and one that may have been counted between reading the number and closing.
    assert asyncio.run(main()) <= 3
    assert engine.stats().pages_free == engine.stats().pages_total


def test_a_full_queue_overloads_and_a_deadline_fails_only_its_request(engine_of) -> None:
    engine = engine_of(max_queued=2)

    async def main() -> None:
        client = LocalClient(engine)
        running = [asyncio.create_task(collect(client, request(PROMPTS[0], max_tokens=60))) for _ in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await collect(client, request(PROMPTS[0]))
        assert refused.value.retry_after_s == 1.0  # nothing is known of the load yet
        assert engine.stats().queue_wait_s == 0.0
        results = await asyncio.gather(*running)
        assert len({tuple(ids(result)) for result in results}) == 1
        timings = [result[-1].timing for result in results]
        held_s = [timing.total_s - timing.queue_s for timing in timings if timing is not None]
        expected_s = sum(held_s) / len(held_s) * 6 / 2
        assert engine._counters.queue_wait_s(waiting=6, running=2) == pytest.approx(expected_s)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_ids": ()}, "prompt is empty"),
        ({"prompt_ids": (131,)}, "token id 131"),
        ({"prompt_ids": (-1,)}, "token id -1"),
        ({"prompt_ids": (1,) * 96}, "96 tokens"),
        ({"sampling": SamplingParams(max_tokens=0)}, "max_tokens=0"),
        ({"sampling": SamplingParams(max_tokens=1, temperature=float("nan"))}, "temperature=nan"),
        ({"sampling": SamplingParams(max_tokens=1, top_p=0.0)}, "top_p=0.0"),
        ({"sampling": SamplingParams(max_tokens=1, seed=2**64)}, "seed=18446744073709551616"),
        ({"sampling": SamplingParams(max_tokens=1, top_logprobs=21, logprobs=True)}, "top_logprobs=21"),
        ({"sampling": SamplingParams(max_tokens=1, top_logprobs=2)}, "needs logprobs"),
        ({"sampling": SamplingParams(max_tokens=1, stop_ids=tuple(range(33)))}, "stop_ids"),
        ({"sampling": SamplingParams(max_tokens=1, stop_ids=(2**31,))}, "stop_ids: 2147483648"),
        ({"sampling": SamplingParams(max_tokens=1, stop_ids=(-1,))}, "stop_ids: -1"),
        ({"sampling": SamplingParams(max_tokens=1, logit_bias=((131, 1.0),))}, "logit_bias: token id 131"),
        ({"sampling": SamplingParams(max_tokens=1, logit_bias=((-1, 1.0),))}, "logit_bias: token id -1"),
        ({"sampling": SamplingParams(max_tokens=1, logit_bias=((5, 1e38),))}, "logit_bias of token 5=1e"),
        ({"sampling": SamplingParams(max_tokens=1, logit_bias=((5, 1.0), (5, 2.0)))}, "names a token twice"),
        (
            {"sampling": SamplingParams(max_tokens=1, logit_bias=((5, 1.0),) * 301)},
            r"logit_bias \(count\)=301",
        ),
        ({"sampling": SamplingParams(max_tokens=8, min_tokens=9)}, "min_tokens=9"),
        ({"sampling": SamplingParams(max_tokens=10**400)}, "max_tokens=1000"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1"),
        ({"deadline_s": float("nan")}, "deadline_s=nan"),
        ({"deadline_s": -1.0}, "deadline_s=-1.0"),
        ({"resume_ids": (3,) * 8}, "nothing is left"),
    ],
)
def test_what_can_never_be_served_is_refused_by_name(engine_of, change: dict, named: str) -> None:
    good = request([5, 6], max_tokens=8)
    bad = Request(**{"id": "bad", "prompt_ids": good.prompt_ids, "sampling": good.sampling, **change})
    with pytest.raises(InvalidRequest, match=named):
        run(engine_of(), bad)


def test_drain_lets_the_running_finish_and_takes_no_more(engine_of) -> None:
    engine = engine_of(max_queued=3)

    async def main() -> None:
        client = LocalClient(engine)
        running = asyncio.create_task(collect(client, request(PROMPTS[0], max_tokens=60)))
        await asyncio.sleep(0.01)
        await client.drain(30.0)
        assert (await running)[-1].finish_reason is FinishReason.LENGTH

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 30
    assert not engine.healthy()


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_a_model_that_gives_nan_fails_its_request_and_no_other(models, tmp_path, kernels: str) -> None:
    """One embedding row is NaN. Whoever holds that token fails by name; its neighbours, and whoever gets its pages
    next, do not notice."""
    import safetensors.numpy

    whole = tiny_model("llama-mha", models)
    expected = hf_greedy(whole, [3, 4, 5], 6)
    damage = next(token for token in range(130, 0, -1) if token not in expected)
    path = shutil.copytree(whole, tmp_path / "damaged")
    weights = safetensors.numpy.load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][damage] = np.nan
    safetensors.numpy.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    opened = open_model(path)
    config = EngineConfig(
        model_id="damaged", lanes=2, page_tokens=4, max_total_tokens=16, kv_bytes=8 * 2 * 3 * 4 * 4 * 16 * 4,
        prefill_chunk_tokens=16, kernels=kernels, cache_dir=str(models),
    )  # fmt: skip
    with few_programs():
        engine = Engine.build(config, opened.config, opened.source)

    async def main() -> None:
        client = LocalClient(engine)
        for _ in range(4):
            damaged = asyncio.create_task(collect(client, request([3, 4, 5, damage], max_tokens=6)))
            beside = request([3, 4, 5], max_tokens=6)
            assert ids(await collect(client, beside)) == expected
            with pytest.raises(RequestFailed, match="NaN"):
                await damaged
            assert ids(await collect(client, request([3, 4, 5], max_tokens=6))) == expected

    asyncio.run(main())
    assert engine.stats().pages_free == engine.info.pages
    engine.stop()


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_prompts_that_begin_alike_share_pages_and_nothing_changes(engine_of, models, kernels: str) -> None:
    engine = engine_of(kernels=kernels, kv_bytes=400 * 2 * 2 * 2 * 4 * 16 * 4)
    path = tiny_model("llama-gqa-tied", models)
    begin = np.random.default_rng(99).integers(3, 131, 30).tolist()
    prompts = [[*begin, *end] for end in ([], [5], [7, 8, 9], [5, 6])]
    (first,) = run(engine, request(prompts[0], max_tokens=8))
    later = run(engine, *(request(prompt, max_tokens=8) for prompt in prompts[1:]))
    salted = request(prompts[1], max_tokens=8)
    (apart,) = run(engine, replace(salted, cache_salt="mine"))
    (follow_up,) = run(engine, request([*prompts[0], *ids(first), 40], max_tokens=8))
    cached = [output[0].cached_tokens for output in (first, *later, apart, follow_up)]
    # Pages of 4: 28 tokens are whole pages; of prompt and answer, whose last token was never computed, 36.
    assert cached == [0, 28, 28, 28, 0, 36]
    for prompt, output in zip((*prompts, prompts[1]), (first, *later, apart)):
        assert ids(output) == hf_greedy(path, prompt, 8)
    assert ids(follow_up) == hf_greedy(path, [*prompts[0], *ids(first), 40], 8)
    assert engine.stats().pages_free == engine.stats().pages_total
    assert engine.stats().pages_remembered > 9


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_prompts_that_begin_alike_share_pages_within_one_launch(engine_of, models, kernels: str) -> None:
    engine, path = engine_of(kernels=kernels), tiny_model("llama-gqa-tied", models)
    begin = np.random.default_rng(98).integers(3, 131, 12).tolist()
    prompts = [[*begin, end] for end in (5, 6, 7, 8)]
    outputs = run(engine, *(request(prompt, max_tokens=8) for prompt in prompts))
    # 13 tokens, then three times one: a launch of 16 takes all four, and whoever came first computes the beginning.
    assert [output[0].cached_tokens for output in outputs] == [0, 12, 12, 12]
    for prompt, output in zip(prompts, outputs):
        assert ids(output) == hf_greedy(path, prompt, 8)
