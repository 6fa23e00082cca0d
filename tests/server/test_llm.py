"""`LLM` over the engine of hand arithmetic: prompts, streams, chats and errors, and the examples of docs/python.md."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from xlane.engine import EngineInfo, EngineLost, Request, StepOutput
from xlane.server import LLM, Invalid, NotReady, Sampling, TemplateFailed, TooLong, UsageError, llm
from xlane.server.backend import Backend
from xlane.server.schema_openai import ChatBody

from ..support.byte_tokenizer import BOS, ByteTokenizer, ThinkingTokenizer
from ..support.fake_engine import FakeEngine
from .test_tools import ARGUMENTS, CALL, TOOL, Templated

GREEDY = Sampling(max_tokens=4, temperature=0)
DOCS = Path(__file__).resolve().parents[2] / "docs"


class Standing:
    """In the place of a `LoadedModel`: the engine is there, and `lost` takes it away."""

    tokenizer = ByteTokenizer()
    engine = FakeEngine()

    def __init__(self, config: object, run: object, backend: Backend, *_: object, **__: object) -> None:
        self.backend, self.lost, self.unloaded = backend, asyncio.Event(), 0

    async def load(self) -> EngineInfo:
        self.backend.ready(self.engine, self.tokenizer, self.engine.info_value)
        return self.engine.info_value

    async def wait(self) -> None:
        await self.lost.wait()
        raise EngineLost("the engine died 5 times in a row")

    async def unload(self, timeout_s: float = 10.0) -> None:
        self.unloaded += 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(llm, "LoadedModel", Standing)
    monkeypatch.setattr(Standing, "engine", FakeEngine())
    return Standing.engine


@pytest.fixture
def model(engine: FakeEngine) -> Iterator[LLM]:
    with LLM(progress=False) as opened:
        yield opened


def test_a_prompt_is_gone_on_from(model: LLM):
    answer = model.generate("ab", GREEDY)
    assert (answer.text, answer.finish_reason) == ("cdef", "length")
    assert [token.id for token in answer.tokens] == list(b"cdef")
    assert answer.prompt_ids == (BOS, *b"ab")
    assert model.generate([*b"xy"], GREEDY).text == "zabc"


def test_many_prompts_keep_their_order_and_only_so_many_are_asked_at_once(
    model: LLM, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    active: list[int] = []
    submit = engine.submit

    def counted(request: Request) -> AsyncIterator[StepOutput]:
        active.append(engine.active + 1)
        return submit(request)

    monkeypatch.setattr(engine, "submit", counted)
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 2
    prompts = [alphabet[number % 26] for number in range(60)]
    samplings = [Sampling(max_tokens=1 + number % 5, temperature=0) for number in range(60)]
    answers = model.generate(prompts, samplings)
    assert [answer.text for answer in answers] == [
        alphabet[number % 26 + 1 : number % 26 + 2 + number % 5] for number in range(60)
    ]
    lanes = engine.info_value.lanes
    assert lanes < max(active) <= 2 * lanes
    assert model.generate([]) == []


def test_a_sampling_is_what_a_client_sends_under_the_same_names(model: LLM, engine: FakeEngine):
    assert {f.name for f in fields(Sampling)} <= set(ChatBody.__struct_fields__)
    model.generate(
        "a",
        Sampling(
            max_tokens=9, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, typical_p=0.8, repetition_penalty=1.5,
            frequency_penalty=0.25, presence_penalty=0.75, seed=11, stop_token_ids=[5], ignore_eos=True, min_tokens=2,
            logit_bias={3: 4.0}, logprobs=1,
        ),
    )  # fmt: skip
    sampling = engine.submitted[-1].sampling
    named = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
    del named["logprobs_mode"], named["watermark"]
    assert named == {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "typical_p": 0.8,
        "repetition_penalty": 1.5, "frequency_penalty": 0.25, "presence_penalty": 0.75, "seed": 11, "stop_ids": (5,),
        "min_tokens": 2, "logit_bias": ((3, 4.0),), "logprobs": True, "top_logprobs": 1,
    }  # fmt: skip


def test_a_stop_text_ends_an_answer_and_more_of_them_are_taken_than_over_http(model: LLM):
    answer = model.generate("a", replace(GREEDY, max_tokens=20, stop=["zz", "yy", "xx", "ww", "ef"]))
    assert (answer.text, answer.finish_reason) == ("bcd", "stop")


def test_log_probabilities_come_with_the_tokens(model: LLM):
    assert [token.logprob for token in model.generate("a", replace(GREEDY, logprobs=0)).tokens] == [
        -1 / 8, -2 / 8, -3 / 8, -4 / 8
    ]  # fmt: skip


def test_a_guided_answer_keeps_to_its_form(model: LLM, engine: FakeEngine):
    engine.obeys = True
    assert model.generate("a", Sampling(max_tokens=20, guided_choice=["yes"])).text == "yes"
    with pytest.raises(Invalid, match="guided_regex"):
        model.generate("a", Sampling(guided_regex="("))


def test_a_stream_says_what_the_answer_says(model: LLM):
    *deltas, last = model.stream("a", GREEDY)
    assert "".join(delta.text for delta in [*deltas, last]) == "bcde"
    assert [delta.finish_reason for delta in deltas] == [None] * len(deltas)
    assert last.finish_reason == "length"


def test_leaving_a_stream_ends_the_generation(model: LLM, engine: FakeEngine):
    engine.delay_s = 0.01
    stream = model.stream("a", Sampling(max_tokens=400, temperature=0))
    assert next(stream).text == "b"
    del stream
    model.generate("a", GREEDY)
    assert engine.cancelled == [engine.submitted[0].id]


def test_a_conversation_is_written_as_the_template_wants_it(model: LLM, engine: FakeEngine):
    talk = [{"role": "user", "content": "q"}]
    engine.reply = "hi"
    first, second = model.chat([talk, [*talk, {"role": "assistant", "content": "r"}, *talk]], GREEDY)
    assert bytes(first.prompt_ids) == b"[user]q|[assistant]"
    assert bytes(second.prompt_ids) == b"[user]q|[assistant]r|[user]q|[assistant]"
    assert model.chat(talk, replace(GREEDY, logprobs=1)).text == "hi"
    with pytest.raises(TemplateFailed, match="no system message"):
        model.chat([{"role": "system", "content": "refuse me"}])
    with pytest.raises(Invalid, match="a chat has no option tool_chioce: did you mean tool_choice"):
        model.chat(talk, tool_chioce="none")  # pyright: ignore[reportCallIssue]


def test_thinking_is_told_apart(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Standing, "tokenizer", ThinkingTokenizer())
    engine.reply = "hm</think>yes"
    talk, most = [{"role": "user", "content": "q"}], Sampling(max_tokens=100)
    with LLM(progress=False) as model:
        whole = model.chat(talk, most)
        deltas = list(model.stream_chat(talk, most))
    assert (whole.reasoning, whole.text) == ("hm", "yes")
    assert ("".join(d.reasoning for d in deltas), "".join(d.text for d in deltas)) == ("hm", "yes")
    with LLM(progress=False, reasoning_parser="none") as model:
        assert model.chat(talk, most).text == engine.reply


def test_calls_of_tools_are_told_apart(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Standing, "tokenizer", Templated("{{ tools }}<tool_call>{'name': …, 'arguments': …}"))
    engine.reply = f"Look:{CALL}"
    talk, most = [{"role": "user", "content": "q"}], Sampling(max_tokens=200)
    with LLM(progress=False) as model:
        whole = model.chat(talk, most, tools=[TOOL])
        *_, last = model.stream_chat(talk, most, tools=[TOOL])
    for answer in (whole, last):
        ((name, arguments),) = [(call.name, call.arguments) for call in answer.calls]
        assert (name, arguments, answer.finish_reason) == ("weather", ARGUMENTS, "tool_calls")


def test_what_is_wrong_is_told_before_anything_is_computed(model: LLM, engine: FakeEngine):
    with pytest.raises(TooLong) as told:
        model.generate(["a", "b" * 600], GREEDY)
    assert told.value.__notes__ == ["in prompt 1 of 2, counted from 0"]
    for wrong, said in (
        (lambda: model.generate("a", Sampling(temperature=-1)), "`temperature` must be between 0.0 and 2.0"),
        (lambda: model.generate("a", Sampling(seed="x")), "Expected `int | null`, got `str`"),  # pyright: ignore
        (lambda: model.generate(["a", "b"], [GREEDY]), "2 prompts and 1 samplings"),
        (lambda: model.generate([7, 9999]), "a token id outside"),
        (lambda: next(model.stream("", GREEDY)), "must not be empty"),
    ):
        with pytest.raises(Invalid, match=re.escape(said)):
            wrong()
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_totl_tokens": 5}, "LLM has no option max_totl_tokens: did you mean max_total_tokens"),
        ({"max_batch_size": "many"}, "--max-batch-size=many: expected a whole number of at least 1"),
        ({"port": 80}, "LLM has no option port"),
        ({"max_input_tokens": 9, "max_total_tokens": 9}, "must be less than"),
    ],
)
def test_a_wrong_option_is_refused_by_name(engine: FakeEngine, options: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=re.escape(said)):
        LLM(**options)


def test_a_closed_one_says_so(engine: FakeEngine):
    with LLM(progress=False) as model:
        pass
    model.close()
    with pytest.raises(NotReady, match="closed"):
        model.generate("a")


def test_an_engine_that_is_lost_for_good_is_told_of(model: LLM):
    standing: Any = model._model
    model._loop.run(_set(standing.lost))
    with pytest.raises(NotReady, match="died 5 times in a row"):
        model.generate("a")
    assert standing.unloaded == 1


async def _set(lost: asyncio.Event) -> None:
    lost.set()
    await asyncio.sleep(0)


EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_pages_examples_run(engine: FakeEngine, example: str):
    engine.obeys = True
    exec(compile(example, "docs/python.md", "exec"), {})
    assert engine.submitted
