"""The whole engine under grammars, on a model nobody trained: whatever it would say, what it says fits.

Free sequences beside guided ones must not notice; what is forced, preempted or resumed must be what is sampled step by step.
"""

import asyncio
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.engine.conftest import collect, ids, run
from tests.support.few_programs import few_programs
from tests.support.guided import MODEL_VOCAB, byte_level
from tests.support.untrained import untrained_model
from xlane.engine import (
    EngineConfig,
    FinishReason,
    InvalidRequest,
    LogprobsMode,
    Overloaded,
    Request,
    RequestFailed,
    SamplingParams,
    StepOutput,
    grammar,
)
from xlane.engine.engine import Engine
from xlane.engine.local import LocalClient
from xlane.models.errors import TokenizerError
from xlane.models.guidance import guidance_tokenizer
from xlane.models.opened import open_model

TEXT = byte_level()
ENDS = TEXT.eos_ids
PROMPT = (5, 6, 7)
PAGE_BYTES = 4 * 2 * 2 * 2 * 16 * 4
"""Four tokens, keys and values, two layers, two heads of 16, float32."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["anna", "bert", "carla maria"]},
        "true": {"type": "boolean"},
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "true", "numbers"],
    "additionalProperties": False,
}  # fmt: skip
JSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
_numbers = itertools.count()


def load() -> LLTokenizer:
    return guidance_tokenizer(TEXT, MODEL_VOCAB)


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    built: dict[tuple, Engine] = {}
    path = untrained_model(
        tmp_path_factory.mktemp("guided"), vocab_size=MODEL_VOCAB, max_position_embeddings=256
    )

    def make(guidance: Callable[[], LLTokenizer] | None = load, **options) -> Engine:
        sizes = {"lanes": 4, "page_tokens": 4, "max_total_tokens": 200, "prefill_chunk_tokens": 16}
        options = sizes | options
        key = (guidance, *sorted(options.items()))
        if key not in built:
            model = open_model(path, weights=False).config
            config = EngineConfig(model_id="guided", kernels="xla", **options)
            # All sizes where requests are compared with others, alone and beside them: in the first.
            with few_programs() if options != sizes else nullcontext():
                built[key] = Engine.build(config, model, None, guidance=guidance)
        return built[key]

    yield make
    for engine in built.values():
        assert engine.stats().compiles_after_ready == 0
        assert engine.stats().lanes_active == engine.stats().queued == 0
        assert engine.stats().pages_free == engine.stats().pages_total
        engine.stop()


def ask(
    rules: str | None, prompt: tuple[int, ...] = PROMPT, resume: tuple[int, ...] = (), **sampling
) -> Request:
    sampling = {"max_tokens": 120, "temperature": 1.0, "stop_ids": ENDS, **sampling}
    return Request(
        id=f"guided-{next(_numbers)}",
        prompt_ids=prompt,
        resume_ids=resume,
        sampling=SamplingParams(**sampling),
        grammar=rules,
    )


def regex(text: str) -> str:
    return LLMatcher.grammar_from_regex(text)


def text_of(outputs: list[StepOutput]) -> str:
    """The text, which an end must follow."""
    tokens = ids(outputs)
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert tokens[-1] in ENDS
    assert not set(tokens[:-1]) & set(ENDS)
    return TEXT.decode(tokens)


def idle(engine: Engine) -> None:
    """Nothing is left in it, soon."""
    deadline = time.monotonic() + 10
    while engine.stats().pages_free < engine.stats().pages_total and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.stats().lanes_active, engine.stats().pages_free) == (0, engine.stats().pages_total)


def logprobs(outputs: list[StepOutput]) -> list[float]:
    return [token.logprob or 0.0 for output in outputs for token in output.tokens]


def test_a_schema_is_kept_whatever_the_seed(engine_of) -> None:
    outputs = run(engine_of(), *(ask(JSON, seed=seed) for seed in range(12)))
    said = [json.loads(text_of(output)) for output in outputs]
    for value in said:
        assert list(value) == ["name", "true", "numbers"]
        assert value["name"] in SCHEMA["properties"]["name"]["enum"]
        assert isinstance(value["true"], bool)
        assert 1 <= len(value["numbers"]) <= 3
        assert all(0 <= number <= 99 for number in value["numbers"])
    assert len({json.dumps(value) for value in said}) > 6


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.5, "top_k": 3},
        {"top_p": 0.3},
        {"min_p": 0.9, "typical_p": 0.2},
        {"repetition_penalty": 3.0, "frequency_penalty": 2.0, "presence_penalty": -2.0},
        {"stop_ids": ()},
        {"min_tokens": 120},
        {"logprobs": True, "top_logprobs": 5},
    ],
    ids=str,
)
def test_a_grammar_is_kept_under_every_way_to_sample(engine_of, sampling: dict) -> None:
    pattern = "(x|yy|true){2,5}-[0-9]{3}(a|b)*z"
    lark = LLMatcher.grammar_from_lark('start: "<" WORD (" " WORD)* ">"\nWORD: /[ab]{2,4}/ | "true"')
    asked = [ask(rules, seed=seed, **sampling) for seed in range(3) for rules in (regex(pattern), lark)]
    outputs = run(engine_of(), *asked)
    for number, output in enumerate(outputs):
        if output[-1].finish_reason is FinishReason.LENGTH:
            assert len(ids(output)) == 120
            continue
        expected = pattern if number % 2 == 0 else "<([ab]{2,4}|true)( ([ab]{2,4}|true))*>"
        assert re.fullmatch(expected, text_of(output))


def test_the_masks_cut_the_distribution_and_nothing_else(engine_of) -> None:
    """Raw log-probabilities are the free model's; processed ones are those, renormalised over what is allowed."""
    engine = engine_of()
    wanted = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1, "temperature": 1.0}
    (free,) = run(engine, ask(None, logprobs_mode=LogprobsMode.RAW, **wanted))
    raw, processed = run(
        engine,
        ask(regex("[ab]x"), logprobs_mode=LogprobsMode.RAW, **wanted),
        ask(regex("[ab]x"), logprobs_mode=LogprobsMode.PROCESSED, **wanted),
    )
    assert dict(raw[0].tokens[0].top) == pytest.approx(dict(free[0].tokens[0].top), abs=1e-5)
    top = dict(processed[0].tokens[0].top)
    a, b = TEXT.encode("a", False) + TEXT.encode("b", False)
    assert {token for token, value in top.items() if value > -np.inf} == {a, b}
    assert np.exp(top[a]) + np.exp(top[b]) == pytest.approx(1, abs=1e-5)
    chosen = raw[0].tokens[0]
    assert chosen.logprob is not None
    other = next(token for token in (a, b) if token != chosen.id)
    assert -8 < chosen.logprob < -3  # one of 300, nearly alike
    assert top[chosen.id] - top[other] == pytest.approx(
        chosen.logprob - _raw_logprob(engine, other), abs=1e-4
    )


def _raw_logprob(engine: Engine, token: int) -> float:
    """The model's own of one first token: what it reports when a grammar leaves nothing else."""
    only = LLMatcher.grammar_from_lark(f"start: <[{token}]>")
    (output,) = run(engine, ask(only, logprobs=True, max_tokens=1))
    assert output[0].tokens[0].id == token
    assert output[0].tokens[0].logprob is not None
    return output[0].tokens[0].logprob


def test_free_sequences_do_not_notice_guided_ones(engine_of) -> None:
    engine = engine_of()
    free = [
        {"prompt": (3, 1, number), "seed": number, "temperature": 0.9 * number, "max_tokens": 40, "stop_ids": (), "logprobs": number == 2}
        for number in range(3)
    ]  # fmt: skip
    alone = [run(engine, ask(None, **one))[0] for one in free]
    mixed = [ask(None, **one) for one in free]
    for number in range(6):
        mixed.insert(2 * number if number < 3 else 0, ask(JSON, seed=number))
    outputs = run(engine, *mixed)
    among = [output for asked, output in zip(mixed, outputs) if asked.grammar is None]
    for one, other in zip(alone, among):
        assert ids(one) == ids(other)
        assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-5)


def test_a_free_sequence_decodes_every_turn_and_a_guided_one_every_second(engine_of) -> None:
    engine = engine_of()
    before = engine.stats().steps
    free, guided = run(
        engine,
        ask(None, max_tokens=100, stop_ids=()),
        ask(regex("[a-z]{100}"), max_tokens=30, seed=3),
    )
    assert (len(ids(free)), len(ids(guided))) == (100, 30)
    # The free one needs 99 steps; the guided one fits beside it and adds none but where it started later.
    assert engine.stats().steps - before <= 99 + 3


def test_same_seed_same_tokens_alone_or_among_others(engine_of) -> None:
    engine = engine_of()
    alone = ids(run(engine, ask(JSON, seed=77))[0])
    others = [ask(JSON if n % 2 else None, prompt=(n, 9), seed=n, max_tokens=30) for n in range(7)]
    assert ids(run(engine, *others[:3], ask(JSON, seed=77), *others[3:])[3]) == alone
    assert any(ids(run(engine, ask(JSON, seed=seed))[0]) != alone for seed in (78, 79, 80))


@pytest.mark.parametrize(
    "penalties", [{}, {"repetition_penalty": 1.7, "frequency_penalty": 1.1, "presence_penalty": 0.6}]
)
@pytest.mark.parametrize("ends", [ENDS, ()])
def test_forced_tokens_are_what_would_have_been_sampled(
    engine_of, monkeypatch: pytest.MonkeyPatch, penalties: dict, ends: tuple[int, ...]
) -> None:
    """Jumping changes the number of launches and no token: positions, penalties and keys are those of step by step."""
    engine = engine_of()
    rules = regex("[ab]{3}: abab is true, (abab|true|12) abababab[ab]{4}, and 1212[0-9]{3}")

    def tokens(least: int) -> tuple[list[list[int]], list[int]]:
        monkeypatch.setattr(grammar, "JUMP_TOKENS", least)
        outputs = run(engine, *(ask(rules, seed=seed, stop_ids=ends, **penalties) for seed in range(5)))
        return [ids(output)[:-1] for output in outputs], [len(output) for output in outputs]

    (often, few), (never, many), (usual, _) = tokens(1), tokens(1000), tokens(4)
    assert often == never == usual
    assert all(less < more - 10 for less, more in zip(few, many))


def test_forced_tokens_longer_than_a_chunk_and_up_to_the_budget(engine_of) -> None:
    engine = engine_of()
    long = "0123456789 " * 7
    (output,) = run(engine, ask(regex(f"[ab]{long}[ab]")))
    assert re.fullmatch(f"[ab]{long}[ab]", text_of(output))
    assert [len(step.tokens) for step in output] == [1 + 77 - 7, 2]  # 12 is one token
    for most in (1, 2, 5, 9, 10, 11, 12):
        (output,) = run(engine, ask(regex("[ab]9876543210"), max_tokens=most))
        assert len(ids(output)) == min(most, 12)
        assert output[-1].finish_reason is (FinishReason.STOP if most == 12 else FinishReason.LENGTH)
        assert re.fullmatch("[ab]9876543210"[: 3 + most], TEXT.decode(ids(output))) is not None


def test_what_is_forced_at_once_comes_with_the_prompt_and_the_first_token(engine_of) -> None:
    engine = engine_of()
    before = engine.stats()
    (output,) = run(engine, ask(regex("9876543210")))
    assert text_of(output) == "9876543210"
    assert len(output) == 1
    until = time.monotonic() + 10
    while (after := engine.stats()).prefill_tokens == before.prefill_tokens and time.monotonic() < until:
        time.sleep(0.001)  # a launch is counted just after its tokens were handed over
    assert (after.steps - before.steps, after.prefill_tokens - before.prefill_tokens) == (0, 13)
    assert after.decode_tokens - before.decode_tokens == 11
    for most in range(1, 11):
        (output,) = run(engine, ask(regex("9876543210"), max_tokens=most))
        assert TEXT.decode(ids(output)) == "9876543210"[:most]
        assert output[-1].finish_reason is FinishReason.LENGTH


def test_memory_pressure_preempts_and_nothing_changes(engine_of) -> None:
    rules = regex("[ab]{6} 9876543210 [ab]{12}: 0000000000 [ab]{9}")

    def asked() -> list[Request]:
        guided = [ask(rules, prompt=(1, number), seed=number, frequency_penalty=0.5) for number in range(4)]
        return [
            *guided,
            *(ask(None, prompt=(2, number), seed=number, stop_ids=(), max_tokens=60) for number in range(2)),
        ]

    expected = [ids(output) for output in run(engine_of(), *asked())]
    tight = engine_of(kv_bytes=26 * PAGE_BYTES, max_total_tokens=80)
    assert tight.info.pages == 26
    assert [ids(output) for output in run(tight, *asked())] == expected
    assert tight.stats().preemptions > 0


@pytest.mark.parametrize("rules", [JSON, regex("[ab]{6} 9876543210 [ab]{12}")])
def test_a_replayed_sequence_goes_on_as_if_nothing_had_happened(engine_of, rules: str) -> None:
    engine = engine_of()
    (whole,) = run(engine, ask(rules, seed=5, repetition_penalty=1.4))
    expected, given = ids(whole), 0
    for step in whole[:-1]:  # an engine dies between two outputs, never within one
        given += len(step.tokens)
        (rest,) = run(engine, ask(rules, seed=5, repetition_penalty=1.4, resume=tuple(expected[:given])))
        assert ids(rest) == expected[given:]
        assert rest[-1].finish_reason is FinishReason.STOP


def test_resumed_tokens_that_end_it_or_do_not_fit_are_refused(engine_of) -> None:
    engine = engine_of()
    a, b = (TEXT.encode(letter, False)[0] for letter in "ab")
    with pytest.raises(InvalidRequest, match="does not follow the grammar"):
        run(engine, ask(regex("ab"), resume=(b,)))
    with pytest.raises(InvalidRequest, match="nothing is left to generate"):
        run(engine, ask(regex("ab*"), resume=(a, ENDS[0]), stop_ids=()))
    (output,) = run(engine, ask(regex("ab"), resume=(a, b)))
    assert text_of(output) == ""


def test_a_cancelled_sequence_frees_its_lane_wherever_it_stands(engine_of) -> None:
    engine = engine_of()

    async def leave_after(count: int) -> None:
        stream = LocalClient(engine).submit(ask(regex("[ab]{3}9876543210[ab]{80}")))
        async for _ in stream:
            count -= 1
            if count <= 0:
                break
        await stream.aclose()

    async def all_of_them() -> None:
        await asyncio.gather(*(leave_after(count) for count in range(1, 13)))

    asyncio.run(all_of_them())
    idle(engine)


def test_a_grammar_that_fails_on_its_way_ends_its_own_request_alone(engine_of) -> None:
    engine = engine_of()
    explosive = regex("(((a{1,100}){1,100}){1,100}){1,100}")
    free = ask(None, max_tokens=50, stop_ids=(), seed=4)
    (expected,) = run(engine, replace(free, id="before"))

    async def together() -> tuple:
        client = LocalClient(engine)
        return tuple(
            await asyncio.gather(
                collect(client, ask(explosive, max_tokens=150, stop_ids=())),
                collect(client, free),
                collect(client, ask(JSON, seed=1)),
                return_exceptions=True,
            )
        )

    failed, beside, guided = asyncio.run(together())
    assert isinstance(failed, RequestFailed)
    assert "too many expressions" in str(failed)
    assert ids(beside) == ids(expected)
    json.loads(text_of(guided))
    assert engine.healthy()


def test_a_slow_mask_holds_up_nobody_else(engine_of, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, compute = engine_of(), grammar.Guide.compute
    gate, at_gate = threading.Event(), threading.Event()

    def slowly(self: grammar.Guide, *asked) -> np.ndarray:
        if threading.current_thread().name.startswith("masks"):
            at_gate.set()
            assert gate.wait(20)
        return compute(self, *asked)

    async def slow_and_free() -> tuple[list[StepOutput], list[StepOutput]]:
        client = LocalClient(engine)
        slow = asyncio.ensure_future(collect(client, ask(regex("[ab]{9}"))))
        assert await asyncio.to_thread(at_gate.wait, 20)
        free = await collect(client, ask(None, max_tokens=60, stop_ids=()))
        assert not slow.done()
        left = asyncio.ensure_future(collect(client, ask(regex("[ab]{9}"))))
        await asyncio.sleep(0.05)
        left.cancel()
        gate.set()
        return await slow, free

    monkeypatch.setattr(grammar.Guide, "compute", slowly)
    slow, free = asyncio.run(slow_and_free())
    assert re.fullmatch("[ab]{9}", text_of(slow))
    assert len(ids(free)) == 60


def test_a_defect_in_a_mask_fails_its_request_and_is_told(engine_of, monkeypatch, caplog) -> None:
    def broken(self: grammar.Guide, *asked) -> np.ndarray:
        if threading.current_thread().name.startswith("masks"):
            raise ZeroDivisionError("a defect")
        return compute(self, *asked)

    engine, compute = engine_of(), grammar.Guide.compute
    monkeypatch.setattr(grammar.Guide, "compute", broken)
    with pytest.raises(RequestFailed, match="ZeroDivisionError"):
        run(engine, ask(regex("[ab]{9}")))
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert text_of(run(engine, ask(regex("[ab]{2}")))[0])


@pytest.mark.parametrize("broken", ["{}", regex("(a"), LLMatcher.grammar_from_json_schema({"type": "foo"})])
def test_a_bad_grammar_is_refused_before_it_touches_the_batch(engine_of, broken: str) -> None:
    engine = engine_of()
    before = engine.stats().prefill_tokens
    with pytest.raises(InvalidRequest, match="the grammar cannot be used"):
        run(engine, ask(broken))
    assert engine.stats().prefill_tokens == before


def test_a_model_without_a_fitting_tokenizer_says_so(engine_of, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_bytes() -> LLTokenizer:
        raise TokenizerError("no bytes")

    engine = engine_of()
    monkeypatch.setattr(engine, "_grammars", grammar.Grammars(no_bytes, MODEL_VOCAB))
    with pytest.raises(InvalidRequest, match="this model takes no grammar: no bytes"):
        run(engine, ask(JSON))
    monkeypatch.setattr(engine, "_grammars", None)
    with pytest.raises(InvalidRequest, match="without a tokenizer"):
        run(engine, ask(JSON))


def test_a_full_queue_refuses_a_grammar_before_it_is_compiled(
    engine_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    compiled: list[str] = []
    monkeypatch.setattr(engine, "_max_queued", 1 - engine.info.lanes)  # one request in all
    monkeypatch.setattr(grammar.Grammars, "_compiled", lambda self, text, tokenizer: compiled.append(text))

    async def ask_two() -> None:
        client = LocalClient(engine)
        first = client.submit(ask(None, max_tokens=150, stop_ids=()))
        await anext(first)
        with pytest.raises(Overloaded):
            await collect(client, ask(regex("a")))
        await first.aclose()

    asyncio.run(ask_two())
    assert compiled == []
    idle(engine)


def test_compiling_holds_up_neither_the_event_loop_nor_the_engine(
    engine_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, compiled = engine_of(), grammar.Grammars._compiled
    gate = threading.Event()

    def slowly(self: grammar.Grammars, text: str, tokenizer: LLTokenizer) -> LLMatcher:
        assert gate.wait(20)
        return compiled(self, text, tokenizer)

    async def beside() -> list[StepOutput]:
        client = LocalClient(engine)
        slow = asyncio.ensure_future(collect(client, ask(regex("a[bc]"))))
        left = asyncio.ensure_future(collect(client, ask(regex("[ab]{90}"))))
        free = await collect(client, ask(None, max_tokens=30, stop_ids=()))
        assert len(ids(free)) == 30
        assert not slow.done()
        left.cancel()  # gives up while its grammar is compiled
        await asyncio.sleep(0)
        gate.set()
        return await slow

    monkeypatch.setattr(grammar.Grammars, "_compiled", slowly)
    assert text_of(asyncio.run(beside())) in ("ab", "ac")
    idle(engine)


def test_many_of_all_kinds_at_once(engine_of) -> None:
    engine = engine_of()
    rng = np.random.default_rng(0)
    kinds = [JSON, regex("[ab]{2,9}"), regex("9876543210(x|true)*"), None]
    asked = [
        ask(kinds[number % 4], prompt=tuple(rng.integers(0, 250, rng.integers(1, 40)).tolist()), seed=number, max_tokens=int(rng.integers(1, 60)))
        for number in range(40)
    ]  # fmt: skip
    together = run(engine, *asked)
    for one, output in zip(asked[:12], together):
        assert ids(run(engine, replace(one, id=f"again-{one.id}"))[0]) == ids(output)
    for one, output in zip(asked, together):
        assert len(ids(output)) == one.sampling.max_tokens or ids(output)[-1] in ENDS
