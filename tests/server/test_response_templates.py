"""Answers read as their model's response template says: what transformers 5 reads in them, however they are cut, and what it
loses. Through the API: told, streamed, guided.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from xlane.models.tokenizer import TextTokenizer, TokenizerFiles
from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.call_rules import CallRules
from xlane.server.config import ServerConfig
from xlane.server.declared import UNKNOWN, find_declared
from xlane.server.detokenize import Detokenizer
from xlane.server.generate import Done, Ending, Progress, TextToken
from xlane.server.grammar import Grammar
from xlane.server.reader import Call, whole
from xlane.server.response_template import REASONING, TemplateUnreadable, read_template
from xlane.server.template_reader import TemplateReader
from xlane.server.tool_formats import HERMES, PLAIN
from xlane.server.tool_parser import CallStart
from xlane.server.tools import Tool, ToolUse

from ..support.byte_tokenizer import BOS, ByteTokenizer
from ..support.fake_engine import FakeEngine, fake_info
from ..support.obedient import TOKENIZER, allows, obedient_ids
from ..support.response_templates import (
    ACTIONS,
    ANSWERS,
    CASES,
    MARKED,
    NAMED,
    TEMPLATES,
    TOOLS,
    WEATHER,
    Case,
)
from .conftest import Rig
from .test_tools import events

RECORDED = json.loads(ANSWERS.read_text())["answers"]
NAMES = [f"{i} {case.template}" for i, case in enumerate(CASES)]
DONE = Done(Ending.EOS, text="", tokens=0, cached_tokens=0, timing=None, mean_logprob=0.0)


def read(template: dict[str, Any], answer: str, prompt: str = "", piece: int = 0) -> dict[str, Any]:
    """What an answer says that comes in pieces of so many characters; by default as one."""
    reader = TemplateReader(read_template(template), TOOLS, prompt)
    size = piece or max(1, len(answer))
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    told = [reader.of(Progress(0, (), text)) for text in pieces] + [reader.of(Progress(0, (), "", DONE))]
    parts = whole(part for one in told for part in one.pieces)
    calls = [part for part in parts if isinstance(part, Call)]
    assert reader.calls == len(calls)
    return {
        "reasoning": "".join(one.reasoning for one in told),
        "content": "".join(part for part in parts if isinstance(part, str)),
        "calls": [[call.name, json.loads(call.arguments.encode())] for call in calls],
    }


@pytest.mark.parametrize(("case", "recorded"), list(zip(CASES, RECORDED, strict=True)), ids=NAMES)
def test_an_answer_is_read_as_transformers_reads_it(case: Case, recorded: dict[str, Any]):
    found = read(TEMPLATES[case.template], case.answer, case.prompt)
    texts = {key: recorded[key].removeprefix(case.begun) for key in ("reasoning", "content")}
    assert found == {**recorded, **texts}
    for piece in (1, 2, 3, 7):
        assert read(TEMPLATES[case.template], case.answer, case.prompt, piece) == found


def test_text_comes_before_its_field_ends():
    reader = TemplateReader(read_template(MARKED), TOOLS, "")
    said = ["<think>I ", "won", "der</th", "ink>\n\nSo", " <ca", "mel"]
    told = [reader.of(Progress(0, (), text)) for text in said]
    assert [one.reasoning for one in told] == ["I", " won", "der", "", "", ""]
    assert [[*one.pieces] for one in told] == [[], [], [], ["So"], [], [" <camel"]]


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "other", "arguments": {}}',
        '{"name": "weather", "arguments": {"city": "Os',
        '{"name": "weather", "arguments": []}',
        '{"arguments": {}}',
        "[1]",
        "no call",
    ],
)
def test_what_is_no_call_is_told_as_it_stands(call: str):
    found = read(MARKED, f"So: <call>{call}</call> And", piece=3)
    assert found == {"reasoning": "", "content": f"So: <call>{call}</call>\nAnd", "calls": []}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (r'{"city": "\ud83d\ude00 \ud83d", "\ud83d": 1}', {"city": "😀 \ud83d", "\ud83d": 1}),
        (r'{"days": "[\"\ud83d\"]"}', {"days": ["\ud83d"]}),
        (r'"{\"city\": \"\ud83d\"}"', {"city": "\ud83d"}),
    ],
)
def test_halves_of_characters_are_told_as_escapes(arguments: str, expected: dict[str, Any]):
    found = read(MARKED, f'<call>{{"name": "weather", "arguments": {arguments}}}</call>')
    assert found["calls"] == [["weather", expected]]


def test_a_call_that_is_cut_off_is_told_as_far_as_it_came():
    assert read(MARKED, 'So. <call>{"name": "wea', piece=2)["content"] == 'So. <call>{"name": "wea'


def test_nothing_is_lost_where_transformers_keeps_the_last_text_only():
    found = read(
        MARKED, 'One <call>{"name": "now"}</call> two<think>a</think> three<think>b</think>', piece=4
    )
    assert found == {"reasoning": "a\nb", "content": "One\ntwo\nthree", "calls": [["now", {}]]}


def test_earlier_messages_of_a_prompt_are_not_read():
    prompt = "<|im_start|>assistant\n<think>old<|im_end|><|im_start|>assistant\n"
    assert read(MARKED, "new", prompt) == {"reasoning": "", "content": "new", "calls": []}
    # Unlike transformers, which would take all of it for the answer's beginning.
    assert read(MARKED, "new", "<think>somebody's words") == {"reasoning": "", "content": "new", "calls": []}


def test_the_tokens_of_thinking_are_counted_and_those_of_the_answer_found():
    reader = TemplateReader(read_template(MARKED), TOOLS, "")
    text = "<think>I see.</think>\nYes."
    for at, char in enumerate(text):
        reader.of(Progress(0, (TextToken(0, char, False, at, None, ()),), char))
    assert reader.reasoning_tokens == len("<think>I see.</think>")
    assert text[slice(*reader.span)] == "Yes."


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "version must be 1"),
        ({"field": {}}, "not understood: field"),
        ({"fields": {}}, "must not be empty"),
        ({"fields": {"content": {}, "thinking": {}}}, "only one field"),
        ({"fields": {"content": {"opens": "a"}}}, "fields.content.*not understood: opens"),
        ({"fields": {"content": {"open": "a", "open_pattern": "a"}}}, "exclude each other"),
        ({"fields": {"content": {"open": []}}}, "must be a text"),
        ({"fields": {"content": {"open_pattern": "("}}}, "open_pattern"),
        ({"fields": {"content": {"content": "yaml"}}}, "must be one of text, int"),
        ({"fields": {"content": {"transform": "a {content}"}}}, "one {place}"),
        ({"start_anchor": None}, "start_anchor must be a text"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], why: str):
    with pytest.raises(TemplateUnreadable, match=why):
        read_template({**MARKED, **change})
    with pytest.raises(TemplateUnreadable, match="start_anchor"):
        read_template({"fields": {"content": {}}})


class Declaring(ByteTokenizer):
    """Of a model that declares a response template, and no format of calls that is known here."""

    def __init__(self, template: dict[str, Any] | None, chat: str = "{{ tools }}") -> None:
        self.response_template = template
        self.chat_template = self.tool_template = chat


def test_a_known_format_goes_before_the_declared_one(config: ServerConfig):
    engine = FakeEngine(info_value=fake_info(9000, 8000))

    def serving(tokenizer: ByteTokenizer) -> Any:
        backend = Backend()
        backend.ready(engine, tokenizer, engine.info_value)
        return backend.serving()

    assert serving(Declaring(MARKED, "{{ tools }}<tool_call>")).tool_format is HERMES
    assert serving(Declaring(MARKED, "{{ tools }}<tool_call>")).declared is None
    assert serving(Declaring(MARKED)).tool_format.opening == ("<call>",)
    assert serving(Declaring(MARKED, "knows none")).tool_format is PLAIN
    assert serving(Declaring({"fields": 1})).declared is None
    assert serving(Declaring(None)).declared is None


@pytest.fixture
def rig_of(config: ServerConfig) -> Iterator[Callable[..., Rig]]:
    clients: list[TestClient] = []

    def make(template: dict[str, Any], chat: str = "{{ tools }}") -> Rig:
        engine, backend = FakeEngine(info_value=fake_info(9000, 8000)), Backend()
        backend.ready(engine, Declaring(template, chat), engine.info_value)
        client = TestClient(create_app(backend, config), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return Rig(client, engine, backend)

    yield make
    for client in clients:
        client.__exit__(None, None, None)


TOOL_LIST = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in TOOLS.items()]


WRITTEN = [name for name in TEMPLATES if name != "lines"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_that_is_required_is_written_as_the_template_reads_it(rig_of: Any, name: str):
    fields = {key: field for key, field in TEMPLATES[name]["fields"].items() if key not in REASONING}
    template = {**TEMPLATES[name], "fields": fields}
    rig = rig_of(template)
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = rig.chat(max_tokens=400, tools=TOOL_LIST, tool_choice=choice)
        assert answer.status_code == 200, answer.text
        grammar = rig.engine.submitted[-1].grammar
        text = bytes(i for i in obedient_ids(grammar, 400) if i < 256).decode()
        calls = read(template, text)["calls"]
        assert calls, text
        assert {call[0] for call in calls} <= ({"weather", "now"} if choice == "required" else {"weather"})
        assert not allows(grammar, "Hello")
    jsonschema.validate(calls[0][1], WEATHER)


@pytest.mark.parametrize(
    ("name", "thought", "called"),
    [
        ("channels", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant",
         '<|channel|>commentary to=functions.weather<|message|>{"city": "x"}<|call|>'),
        ("actions", "<|START_THINKING|>Hm<|END_THINKING|>",
         '<|START_ACTION|>[{"tool_name": "weather", "parameters": {}}, {"tool_name": "now", "parameters": {}}]<|END_ACTION|>'),
        ("tagged", "<think>Hm</think>\n\n", "<call> <f=weather>\n<p=days>\n3\n</p>\n</f></call>"),
    ],
)  # fmt: skip
def test_a_model_thinks_before_it_is_held_to_a_form(rig_of: Any, name: str, thought: str, called: str):
    rig = rig_of(TEMPLATES[name])
    assert rig.chat(tools=TOOL_LIST, tool_choice="required").status_code == 200
    grammar = rig.engine.submitted[-1].grammar
    assert allows(grammar, thought + called) is (name != "tagged")
    assert allows(grammar, (thought + called).replace("<call> <f", "<call><f"))
    assert not allows(grammar, called + thought)
    assert rig.chat(response_format={"type": "json_object"}).status_code == 200
    begins = {"channels": "<|channel|>final<|message|>", "actions": "<|START_RESPONSE|>"}.get(name, "")
    grammar = rig.engine.submitted[-1].grammar
    assert allows(grammar, f"{thought}{begins}{{}}")
    assert not allows(grammar, f"{thought}{begins}Hi")


def test_a_free_text_and_single_calls_are_allowed_where_a_tool_may_be_called_once(rig_of: Any):
    rig = rig_of(TEMPLATES["channels"])
    assert rig.chat(tools=TOOL_LIST, parallel_tool_calls=False).status_code == 200
    grammar = rig.engine.submitted[-1].grammar
    call = "<|channel|>commentary to=functions.now<|message|>{}<|call|>"
    assert allows(grammar, "<|channel|>final<|message|>Hello")
    assert allows(grammar, call)
    assert not allows(grammar, call + call)


def test_calls_that_cannot_be_written_are_refused_by_name_where_they_are_required(rig_of: Any):
    declared = find_declared(Declaring(TEMPLATES["lines"]))
    assert declared is not None
    assert declared.tool_format is UNKNOWN
    rig = rig_of(TEMPLATES["lines"])
    answer = rig.chat(tools=TOOL_LIST, tool_choice="required")
    assert answer.status_code == 400
    assert "response template" in answer.json()["error"]["message"]
    assert rig.chat(tools=TOOL_LIST).status_code == 200
    answer = rig.chat(response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert "how thinking is written" in answer.json()["error"]["message"]


ANSWER = '<think>Hm.</think>Let me look.\n<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'


def test_delimiters_that_are_control_tokens_are_kept_and_written_as_such():
    class Controlled(Declaring):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            head, mark, tail = text.partition("<bos>")
            return [*head.encode(), *([BOS] if mark else ()), *(self.encode(tail) if mark else ())]

    call = {**MARKED["fields"]["tool_calls"], "open_pattern": r"<bos>c(?P<name>\w+):", "transform": NAMED}
    tokenizer = Controlled({**MARKED, "fields": {"tool_calls": call, "content": {}}})
    declared = find_declared(tokenizer)
    assert declared is not None
    assert declared.kept_ids == {BOS}
    tools = (Tool("now"),)
    calls = CallRules(declared.tool_format, ToolUse(tools, "required", tools), tokenizer)
    matcher = LLMatcher(TOKENIZER, Grammar(f"start: answer\n{calls.required()}\n", calls.parts).text())
    ids = [BOS, *b"cnow:{}</call>"]
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()
    reader = TemplateReader(declared.template, {"now": {}}, "")
    start = reader.of(Progress(0, (), "<bos>cnow:{}</call>", DONE)).pieces[0]
    assert isinstance(start, CallStart)
    assert start.name == "now"


def test_a_tokenizer_whose_delimiters_are_control_tokens_as_models_have_them():
    backend = Tokenizer(BPE({char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "<|other|>"]
    )
    chat = "{{ tools }}{{ messages[0].content }}<|start|>assistant"
    tokenizer = TextTokenizer(
        TokenizerFiles(backend, {"default": chat}, response_template=TEMPLATES["channels"])
    )
    declared = find_declared(tokenizer)
    assert declared is not None
    assert not declared.left_open(tokenizer.apply_chat([{"role": "user", "content": "a"}]))
    assert declared.left_open("<|start|>assistant<|channel|>analysis<|message|>")
    answer = CASES[2].answer.replace("We look", "<|other|>We l\u00f8\u00f8k")
    text, reader = (
        Detokenizer(tokenizer, kept_ids=declared.kept_ids),
        TemplateReader(declared.template, TOOLS),
    )
    told = []
    for token in tokenizer.encode(answer, add_special_tokens=False):
        text.push(token)
        told.append(reader.of(Progress(0, (), text.take())))
    told.append(reader.of(Progress(0, (), text.finish(), DONE)))
    assert "".join(one.reasoning for one in told) == "We l\u00f8\u00f8k it up."
    call = whole(piece for one in told for piece in one.pieces)
    assert [(one.name, json.loads(one.arguments)) for one in call if isinstance(one, Call)] == [
        ("weather", {"city": "Oslo", "days": 2})
    ]


def test_a_chat_tells_thinking_text_and_calls_whole_and_streamed(rig_of: Any):
    rig = rig_of(MARKED)
    rig.engine.reply = ANSWER
    asked = {"max_tokens": 500, "tools": TOOL_LIST}
    choice = rig.chat(**asked).json()["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning"]) == ("Let me look.", "Hm.")
    called = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert [call["function"] for call in message["tool_calls"]] == [called]
    deltas = [event["choices"][0]["delta"] for event in events(rig.chat(**asked, stream=True).text)]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me look."
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == "Hm."
    parts = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    assert [part.get("name") for part in parts] == ["weather", None]
    assert "".join(part["arguments"] for part in parts) == called["arguments"]
    assert rig.chat(**{**asked, "tools": None}).json()["choices"][0]["message"]["content"].endswith("</call>")


def test_a_model_that_knows_no_tools_is_told_of_them_in_words_all_the_same(rig_of: Any):
    rig = rig_of(ACTIONS, chat="{{ messages }}")
    rig.engine.reply = (
        '<|START_RESPONSE|>Well. <tool_call>{"name": "now", "arguments": {}}</tool_call><|END_RESPONSE|>'
    )
    message = rig.chat(max_tokens=500, tools=TOOL_LIST).json()["choices"][0]["message"]
    assert message["content"] == "Well."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["now"]
    assert rig.chat(max_tokens=500, tools=TOOL_LIST, tool_choice="required").status_code == 200
    assert allows(
        rig.engine.submitted[-1].grammar,
        '<|START_RESPONSE|><tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    )


def test_the_other_apis_tell_the_same(rig_of: Any):
    rig = rig_of(MARKED)
    rig.engine.reply = ANSWER
    tool = {"name": "weather", "input_schema": WEATHER}
    body = {
        "model": "fake/alphabet",
        "max_tokens": 2000,
        "messages": [{"role": "user", "content": "a"}],
        "tools": [tool],
    }
    told = rig.client.post(
        "/v1/messages", json={**body, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    )
    assert told.status_code == 200, told.text
    assert [block["type"] for block in told.json()["content"]] == ["thinking", "text", "tool_use"]
    tool = {"type": "function", "name": "weather", "parameters": WEATHER}
    told = rig.client.post("/v1/responses", json={"input": "a", "max_output_tokens": 500, "tools": [tool]})
    assert [item["type"] for item in told.json()["output"]] == ["reasoning", "message", "function_call"]
    stream = rig.client.post(
        "/v1/responses", json={"input": "a", "max_output_tokens": 500, "tools": [tool], "stream": True}
    )
    assert "response.function_call_arguments.done" in stream.text
    assert "response.completed" in stream.text


def test_thinking_is_text_where_it_is_not_to_be_parted(config: ServerConfig):
    engine, backend = FakeEngine(info_value=fake_info(9000, 8000)), Backend()
    backend.ready(engine, Declaring(MARKED), engine.info_value)
    app = create_app(backend, replace(config, reasoning_parser="none"))
    with TestClient(app, raise_server_exceptions=False) as client:
        engine.reply = "<think>Hm.</think>Yes."
        message = Rig(client, engine, backend).chat(max_tokens=99).json()["choices"][0]["message"]
    assert message["content"] == "Hm.\nYes."
    assert "reasoning" not in message
