"""Guesses on the device and through the engine: they make a text come sooner and never change it."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from safetensors.numpy import save_file

from tests.engine.conftest import ids, request, run
from tests.engine.test_programs import GREEDY, LANES, MOST, PAGE, PROMPT, Device, tokens_of
from tests.support.few_programs import few_programs
from tests.support.guided import MODEL_VOCAB, byte_level
from tests.support.untrained import CONFIG, loud, untrained_model
from xlane.engine import (
    EngineConfig,
    FinishReason,
    LogprobsMode,
    Request,
    SamplingParams,
    StepOutput,
    TokenOutput,
)
from xlane.engine.batch import pack_plan, read_result
from xlane.engine.build import build, design
from xlane.engine.engine import Engine
from xlane.engine.opening import open_served
from xlane.engine.programs import Programs, compile_all, param_sharding
from xlane.engine.turn import NO_PAGE, Row, Size
from xlane.models.guidance import guidance_tokenizer
from xlane.models.loader import dummy_params
from xlane.models.lora_weights import is_adapters
from xlane.models.opened import open_model

pytestmark = pytest.mark.slow

RANDOM = replace(GREEDY, temperature=1.3, seed=9, logprobs=True, top_logprobs=3, max_tokens=12)
ROWS = 8


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    model = open_model(untrained_model(tmp_path_factory.mktemp("untrained")), weights=False).config
    config = EngineConfig(
        model_id="m", kernels="xla", lanes=LANES, page_tokens=PAGE, max_total_tokens=MOST,
        prefill_chunk_tokens=32, speculate=5,
    )  # fmt: skip
    return compile_all(replace(design(config, model)[0], sizes=(Size(LANES, 0), Size(ROWS, 0), Size(0, 32))))


@pytest.fixture(scope="module")
def params(programs: Programs) -> tuple[jax.Array, ...]:
    b = programs.blueprint
    return loud(dummy_params(b.graph.specs, lambda spec: param_sharding(b.placement, spec)))


class Guessing(Device):
    """A device whose lanes may have guesses."""

    def begin(self, lane: int, sampling: SamplingParams) -> list[int]:
        segment = self.segment(lane, PROMPT[: 9 + lane], 0, last=True, prompt=9 + lane, sampling=sampling)
        return tokens_of(self.prefill(segment))

    def verify(
        self, guesses: dict[int, Sequence[int]], sampling: SamplingParams
    ) -> dict[int, list[TokenOutput]]:
        """One launch for these lanes, each with its guesses -> what each got."""
        rows: list[Row] = []
        for lane, guessed in guesses.items():
            for ahead, guess in enumerate((0, *guessed)):
                at = int(self.state.position[lane]) + ahead
                page = self.pages(lane, at + 1)[-1] if at % PAGE == 0 else NO_PAGE
                rows.append(Row(lane, at // PAGE, page, ahead, guess))
        plan = pack_plan(rows, [], Size(ROWS, 0), 1, self.blueprint.shapes.table_width, LANES)
        self.kv, self.state, (result, _) = self.programs(
            Size(ROWS, 0), self.params, self.kv, self.state, jnp.array(plan), self.masks(ROWS, None)
        )
        made: dict[int, list[TokenOutput]] = {lane: [] for lane in guesses}
        for row, got in zip(rows, np.asarray(result)):
            token = read_result(got, sampling)
            if token is not None:
                assert isinstance(token, TokenOutput)
                made[row.lane].append(token)
        return made


def stepwise(
    programs: Programs, params: tuple[jax.Array, ...], sampling: SamplingParams, lane: int
) -> list[TokenOutput]:
    """All tokens after the first, one launch each."""
    device = Guessing(programs, params)
    device.begin(lane, sampling)
    steps = (device.decode(lane, size=LANES, sampling=sampling) for _ in range(sampling.max_tokens))
    return [token for step in steps for token in step if token is not None]


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, RANDOM, replace(RANDOM, watermark=True, top_p=0.8)],
    ids=["greedy", "random", "marked"],
)
@pytest.mark.parametrize("right", range(6))
def test_right_guesses_are_taken_up_to_the_first_wrong_one(
    programs: Programs, params: tuple[jax.Array, ...], right: int, sampling: SamplingParams
) -> None:
    """Lane 1 has five guesses, of which the first `right` ones are right, over two page borders; lane 2 has none."""
    expected, other = (stepwise(programs, params, sampling, lane) for lane in (1, 2))
    device = Guessing(programs, params)
    for lane in (1, 2):
        device.begin(lane, sampling)
    truth = [token.id for token in expected[:5]]
    guesses = [*truth[:right], *((token + 1) % 19 for token in truth[right:])]
    made = device.verify({1: guesses, 2: ()}, sampling)
    got, beside = made[1], made[2]
    assert len(got) == right + 1
    assert len(beside) == 1
    while len(got) < len(expected):  # what wrong guesses left behind is not seen by what comes after
        got += device.verify({1: [0, 0], 2: [0]}, sampling)[1]
    assert [token.id for token in got] == [token.id for token in expected]
    for one, two in zip([*got, *beside], [*expected, *other]):
        if sampling.logprobs:
            assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
            assert [i for i, _ in one.top] == [i for i, _ in two.top]


def test_guesses_leave_the_state_that_steps_leave(programs: Programs, params: tuple[jax.Array, ...]) -> None:
    fast, slow = Guessing(programs, params), Guessing(programs, params)
    for device in (fast, slow):
        device.begin(1, RANDOM)
    truth = [token.id for token in stepwise(programs, params, RANDOM, 1)]
    fast.verify({1: [*truth[:3], truth[3] + 1, 0]}, RANDOM)
    for _ in range(4):
        slow.decode(1, size=LANES, sampling=RANDOM)
    for name in ("token", "position", "remaining", "active", "seen"):
        np.testing.assert_array_equal(getattr(fast.state, name)[1], getattr(slow.state, name)[1], name)


@pytest.mark.parametrize("budget", [2, 4])
def test_a_lane_ends_among_its_guesses_where_it_would_have_ended(
    programs: Programs, params: tuple[jax.Array, ...], budget: int
) -> None:
    truth = [token.id for token in stepwise(programs, params, RANDOM, 0)]
    short = Guessing(programs, params)
    short.begin(0, replace(RANDOM, max_tokens=budget))
    assert len(short.verify({0: truth[:5]}, RANDOM)[0]) == budget - 1
    assert not bool(short.state.active[0])
    stopping = replace(RANDOM, stop_ids=(truth[budget],))
    stopped = Guessing(programs, params)
    stopped.begin(0, stopping)
    got = [token.id for token in stopped.verify({0: truth[:5]}, RANDOM)[0]]
    assert got == truth[: truth.index(truth[budget]) + 1]
    assert not bool(stopped.state.active[0])
    assert stopped.verify({0: truth[:3]}, RANDOM)[0] == []


def test_accepted_tokens_are_drawn_from_the_models_own_distribution(
    programs: Programs, params: tuple[jax.Array, ...]
) -> None:
    """Over many seeds, the token that is held against a guess, and the one after a right guess, occur as often as the
    model's probabilities say, which a prefill of the same text tells."""
    warm = replace(RANDOM, temperature=3.0, top_logprobs=19, logprobs_mode=LogprobsMode.PROCESSED)
    device, prompt, first = Guessing(programs, params), PROMPT[:9], 4

    def shares(*output: int) -> np.ndarray:
        text = [*prompt, *output]
        (one,) = device.prefill(device.segment(0, text, 0, last=True, prompt=9, sampling=warm))
        assert one is not None
        return np.exp([dict(one.top)[token] for token in range(19)])

    expected = shares(first)
    guess = int(expected.argmax())
    seconds, thirds = np.zeros(19), np.zeros(19)
    only = {lane: np.array([1 << first], np.int32) for lane in range(LANES)}
    for launch in range(250):
        device.prefill(
            *(
                device.segment(
                    lane, prompt, 0, last=True, prompt=9, sampling=replace(warm, seed=LANES * launch + lane)
                )
                for lane in range(LANES)
            ),
            masks=only,
        )
        for second, *third in device.verify(dict.fromkeys(range(LANES), (guess,)), warm).values():
            seconds[second.id] += 1
            assert bool(third) == (second.id == guess)
            for token in third:
                thirds[token.id] += 1
    assert thirds.sum() == seconds[guess] > 80
    for counted, share in ((seconds, expected), (thirds, shares(first, guess))):
        often = share * counted.sum() > 4
        mean = (share * counted.sum())[often]
        chi2 = ((counted[often] - mean) ** 2 / mean).sum()
        assert often.sum() > 4
        assert chi2 < often.sum() + 4 * np.sqrt(2 * often.sum())


TEXT = byte_level()
SCHEMA = {
    "type": "object",
    "properties": {"true": {"type": "boolean"}, "abab": {"type": "array", "items": {"enum": ["12", "truer"]}, "minItems": 3, "maxItems": 5}},
    "required": ["true", "abab"],
    "additionalProperties": False,
}  # fmt: skip
JSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
LOOP = [17, 30, 41, 52, 63] * 5


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    built: dict[tuple, Engine] = {}
    path = untrained_model(
        tmp_path_factory.mktemp("guesses"), vocab_size=MODEL_VOCAB, max_position_embeddings=256
    )
    adapter = blank_adapter(tmp_path_factory.mktemp("adapter"))

    def guidance() -> LLTokenizer:
        return guidance_tokenizer(TEXT, MODEL_VOCAB)

    def make(**options) -> Engine:
        options = {
            "lanes": 4,
            "page_tokens": 4,
            "max_total_tokens": 200,
            "prefill_chunk_tokens": 16,
            "max_queued": 256,
            **options,
        }
        key = tuple(sorted(options.items()))
        if key not in built:
            config = EngineConfig(
                model_id="guesses", kernels="xla", lora_adapters=(f"tuned={adapter}",), **options
            )
            model = open_served(config, path, weights=False).config
            with few_programs():
                made = build(config, model, None)
            # Random as the weights are, and large enough to be heard beside them.
            params = tuple(
                20 * array if is_adapters(spec) else array
                for spec, array in zip(made.programs.blueprint.graph.specs, made.params, strict=True)
            )
            built[key] = Engine(config, model, replace(made, params=params), guidance=guidance)
        return built[key]

    yield make
    for engine in built.values():
        assert engine.stats().compiles_after_ready == 0
        assert engine.stats().pages_free == engine.stats().pages_total
        engine.stop()


def blank_adapter(to: Path) -> Path:
    """One of rank 4 for every feed-forward's last map, of which only the shapes are looked at."""
    names = [f"base_model.model.model.layers.{layer}.mlp.down_proj.lora" for layer in range(2)]
    shapes = {"A": (4, CONFIG["intermediate_size"]), "B": (CONFIG["hidden_size"], 4)}
    tensors = {
        f"{name}_{part}.weight": np.zeros(shape, np.float32)
        for name in names
        for part, shape in shapes.items()
    }
    save_file(tensors, to / "adapter_model.safetensors")
    (to / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return to


def asked(how: dict, prompt: Sequence[int] = LOOP, grammar: str | None = None) -> Request:
    made = request([*prompt], **{"max_tokens": 60, "seed": 11, **how})
    return replace(made, grammar=grammar)


def same(one: list[StepOutput], two: list[StepOutput]) -> None:
    """Equal tokens, ends and log-probabilities, however they were parted into steps."""
    assert ids(one) == ids(two)
    assert one[-1].finish_reason is two[-1].finish_reason
    for a, b in zip(itertools.chain(*(s.tokens for s in one)), itertools.chain(*(s.tokens for s in two))):
        assert (a.logprob is None) == (b.logprob is None)
        if a.logprob is not None:
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert [i for i, _ in a.top] == [i for i, _ in b.top]


WAYS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_p": 0.9},
    "scored": {"logprobs": True, "top_logprobs": 2},
    "stopping": {"stop_ids": (2, 7, 8, 9), "min_tokens": 3, "temperature": 1.5},
    "short": {"max_tokens": 2},
    "biased": {"logit_bias": ((17, 50.0), (30, 50.0)), "temperature": 1.0},
    "penalised": {"frequency_penalty": 0.5, "temperature": 0.8},
}


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_text_is_the_same_with_guesses_as_without(engine_of, lanes: int) -> None:
    plain, guessing = engine_of(lanes=lanes), engine_of(lanes=lanes, speculate=4)
    before = guessing.stats()
    for one, two in zip(
        *(run(engine, *map(asked, WAYS.values())) for engine in (plain, guessing)), strict=True
    ):
        same(one, two)
    after = guessing.stats()
    assert (plain.stats().guessed_tokens, plain.stats().accepted.sum) == (0, 0)
    accepted = after.accepted.sum - before.accepted.sum
    assert 0 < accepted <= after.guessed_tokens - before.guessed_tokens


def test_what_repeats_comes_several_tokens_a_step(engine_of) -> None:
    """A bias leaves one token: after a few, every step makes five."""
    guessing = engine_of(lanes=1, speculate=4)
    before = guessing.stats()
    (output,) = run(guessing, asked({"logit_bias": ((17, 100.0),)}))
    assert ids(output) == [17] * 60
    # Of the sixty, the first comes of the prompt; a reader that is late is given several steps as one.
    assert 59 / 5 <= guessing.stats().steps - before.steps < 20
    assert output[-1].finish_reason is FinishReason.LENGTH


def test_nothing_is_guessed_for_whom_penalties_look_at(engine_of) -> None:
    guessing = engine_of(lanes=1, speculate=4)
    before = guessing.stats()
    run(guessing, asked({"logit_bias": ((17, 100.0),), "presence_penalty": 0.1}))
    assert guessing.stats().guessed_tokens == before.guessed_tokens


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_is_the_same_and_comes_in_fewer_steps(engine_of, logprobs: bool, temperature: float) -> None:
    plain, guessing = engine_of(), engine_of(speculate=4)
    how = {"temperature": temperature, "stop_ids": TEXT.eos_ids, "logprobs": logprobs, "max_tokens": 120}
    steps: list[int] = []
    outputs = []
    for engine in (plain, guessing):
        before = engine.stats().steps
        outputs.append(run(engine, asked(how, grammar=JSON))[0])
        steps.append(engine.stats().steps - before)
    same(*outputs)
    assert json.loads(TEXT.decode(ids(outputs[1])))["abab"]
    assert steps[1] < (0.6 if logprobs else 0.95) * steps[0]
    # Beside others, of which some guess and some have a grammar.
    crowd = [asked(how, grammar=JSON), asked({}), asked(how, [5, 6], JSON), asked({"temperature": 2.0}, [9])]
    for one, two in zip(run(plain, *crowd), run(guessing, *crowd_again(crowd)), strict=True):
        same(one, two)


def crowd_again(crowd: list[Request]) -> list[Request]:
    return [replace(one, id=f"{one.id}-again") for one in crowd]


def test_preempted_and_resumed_texts_are_the_same(engine_of) -> None:
    plain, guessing = engine_of(), engine_of(speculate=4, kv_bytes=60 * PAGE * 2 * 2 * 2 * 16 * 4)
    crowd = [asked({"max_tokens": 90}, [number, *LOOP]) for number in range(4)]
    expected = run(plain, *crowd)
    for one, two in zip(expected, run(guessing, *crowd_again(crowd)), strict=True):
        same(one, two)
    assert guessing.stats().preemptions > 0
    assert guessing.stats().accepted.sum > 0
    resumed = replace(crowd[0], id="resumed", resume_ids=tuple(ids(expected[0])[:40]))
    assert ids(run(guessing, resumed)[0]) == ids(expected[0])[40:]


OPTIONS = {
    "max_tokens": {"max_tokens": 1},
    "temperature": {"temperature": 1.5},
    "top_k": {"temperature": 1.5, "top_k": 5},
    "top_p": {"temperature": 1.5, "top_p": 0.6},
    "min_p": {"temperature": 1.5, "min_p": 0.2},
    "typical_p": {"temperature": 1.5, "typical_p": 0.4},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "frequency_penalty": {"frequency_penalty": 1.2},
    "presence_penalty": {"presence_penalty": 0.9},
    "seed": {"temperature": 1.5, "seed": 2**64 - 1},
    "stop_ids": {"temperature": 1.5, "stop_ids": tuple(range(32))},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 20},
    "logprobs_mode": {"temperature": 1.5, "logprobs": True, "logprobs_mode": LogprobsMode.PROCESSED},
    "min_tokens": {"min_tokens": 12, "stop_ids": tuple(range(32))},
    "logit_bias": {"logit_bias": ((17, -100.0), (30, 100.0))},
    "watermark": {"temperature": 1.5, "watermark": True},
}
RULES = LLMatcher.grammar_from_regex("(ab|true|12){2,4}z")
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scored": {"sampling": {"logprobs": True, "top_logprobs": 3}},
    "guided": {"grammar": RULES},
    "guided and scored": {"grammar": RULES, "sampling": {"logprobs": True}},
    "prompt scored": {"prompt_logprobs": 2},
    "resumed": {"resume_ids": (41,)},
    "urgent": {"priority": -1},
    "adapted": {"adapter": "tuned"},
    "adapted, guided and scored": {"adapter": "tuned", "grammar": RULES, "sampling": {"logprobs": True}},
}


def test_every_option_goes_with_every_mode_and_with_guesses(engine_of) -> None:
    """All at once, so that each meets the others in its launches; nobody fails, and nobody's text is another's matter."""
    assert set(OPTIONS) == {field.name for field in fields(SamplingParams)}
    whole: list[tuple[str, Request]] = []
    for mode, extra in MODES.items():
        for how in OPTIONS.values():
            how = {"max_tokens": 12, **extra.get("sampling", {}), **how}
            if "resume_ids" in extra and how["max_tokens"] == 1:
                continue  # nothing would be left
            rest = {name: value for name, value in extra.items() if name != "sampling"}
            whole.append((mode, replace(asked(how), **rest)))
    plain, guessing = engine_of(), engine_of(speculate=4)
    requests = [one for _, one in whole]
    texts = run(plain, *requests)
    for one, two in zip(texts, run(guessing, *crowd_again(requests)), strict=True):
        same(one, two)
    for (mode, one), text in zip(whole, texts, strict=True):
        assert 1 <= len(ids(text)) <= one.sampling.max_tokens
        if "guided" in mode and ids(text)[-1] in TEXT.eos_ids:
            assert re.fullmatch("(ab|true|12){2,4}z", TEXT.decode(ids(text)))
    said = {name: [ids(text) for (mode, _), text in zip(whole, texts) if mode == name] for name in MODES}
    assert sum(one != two for one, two in zip(said["plain"], said["adapted"])) > len(OPTIONS) / 2
    # Alone, each says what it says in the crowd.
    for one, text in list(zip(requests, texts, strict=True))[::9]:
        same(run(plain, replace(one, id=f"{one.id}-alone"))[0], text)
