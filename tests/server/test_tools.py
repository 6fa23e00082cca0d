"""Tools on every API over the fake engine: what the model is told, what may be called, and how calls come out."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
from starlette.testclient import TestClient

from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.tool_formats import (
    GLM,
    HERMES,
    LFM,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    PLAIN,
    PYTHON,
    QWEN_CODER,
    SEED,
    find_format,
)

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine, fake_info
from ..support.obedient import allows
from .conftest import Rig

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS},
}
OTHER = {"type": "function", "function": {"name": "now"}}
ARGUMENTS = '{"city": "Oslo", "days": 2}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


class Templated(ByteTokenizer):
    """Of a model whose template tells of tools: `{tools}` goes first."""

    def __init__(self, template: str) -> None:
        self.chat_template = self.tool_template = template

    def apply_chat(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, *args: Any, **kwargs: Any
    ) -> str:
        told = [
            {
                **m,
                "content": m["content"] + json.dumps(m["tool_calls"]) if "tool_calls" in m else m["content"],
            }
            for m in messages
        ]
        names = "".join(f"<{tool['function']['name']}>" for tool in tools or ())
        return names + super().apply_chat(told, None, *args, **kwargs)


@pytest.fixture
def rig(config: ServerConfig, tokenizer: ByteTokenizer) -> Iterator[Rig]:
    engine, backend = FakeEngine(info_value=fake_info(9000, 8000)), Backend()
    backend.ready(engine, tokenizer, engine.info_value)
    with TestClient(create_app(backend, config), raise_server_exceptions=False) as client:
        yield Rig(client, engine, backend)


def ask(rig: Rig, reply: str | None = None, **fields: Any) -> Any:
    rig.engine.reply = reply
    answer = rig.chat(**{"max_tokens": 500, "tools": [TOOL, OTHER], **fields})
    assert answer.status_code == 200, answer.text
    return answer


def prompt_of(rig: Rig) -> str:
    return ByteTokenizer().decode(rig.engine.submitted[-1].prompt_ids)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ tools }}<tool_call>{'name': …, 'arguments': …}", HERMES),
        ("{{ tools }}<tool_call><function=name>", QWEN_CODER),
        ("{{ tools }}<seed:tool_call><function=name>", SEED),
        ("{{ tools }}<tool_call>name<arg_key>", GLM),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL),
        ("{{ tools }}[TOOL_CALLS]f[ARGS]{}", MISTRAL_NAMED),
        ('{{ tools }}{"name": function name, "parameters": dictionary of …}', LLAMA),
        ("{{ tools }}[func_name1(params_name1=…)]", PYTHON),
        ("{{ tools }}<|tool_list_start|>", LFM),
        ("{{ messages }}", PLAIN),
        (None, PLAIN),
    ],
)
def test_the_format_is_the_one_the_template_speaks_of(template: str | None, form: Any):
    tokenizer = ByteTokenizer()
    tokenizer.tool_template = template
    assert find_format(tokenizer) is form


def test_a_template_without_tools_is_told_of_them_in_words(rig: Rig):
    ask(rig, "ok")
    prompt = prompt_of(rig)
    assert prompt.startswith("[system]You may call functions.")
    assert json.dumps({"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}) in prompt
    assert prompt.endswith("|[user]a|[assistant]")
    assert rig.engine.submitted[-1].grammar is None
    ask(rig, "ok", tool_choice="none")
    assert prompt_of(rig) == "[user]a|[assistant]"
    ask(rig, "ok", tool_prompt="Think first.")
    assert prompt_of(rig).endswith("[user]a\n---\nThink first.|[assistant]")


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": {}}},
    ]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
]  # fmt: skip


def test_results_of_tools_are_told_in_words_too(rig: Rig):
    ask(rig, "ok", messages=HISTORY)
    assert prompt_of(rig).partition("[user]a|")[2] == (
        '[assistant]<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        + NOW
        + "|"
        "[user]<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>|[assistant]"
    )


@pytest.mark.parametrize("arguments", ['{"city": ', r'{"city": "\ud83d"}'])
def test_arguments_that_a_model_wrote_wrongly_are_told_as_it_wrote_them(rig: Rig, arguments: str):
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    ask(rig, "ok", messages=[HISTORY[0], {"role": "assistant", "tool_calls": [call]}])
    assert f'"arguments": {json.dumps(arguments)}' in prompt_of(rig)


class TestHermes:
    @pytest.fixture
    def tokenizer(self) -> ByteTokenizer:
        return Templated("{{ tools }}<tool_call>")

    def test_the_template_gets_tools_and_arguments_as_objects(self, rig: Rig):
        ask(rig, "ok", messages=HISTORY)
        prompt = prompt_of(rig)
        assert prompt.startswith("<weather><now>[user]a|")
        assert '"arguments": {"city": "Oslo"}' in prompt
        assert "[tool]rain|[tool]noon|" in prompt


class TestMistral:
    @pytest.fixture
    def tokenizer(self) -> ByteTokenizer:
        return Templated("{{ tools }}[TOOL_CALLS]")

    def test_ids_are_short_both_ways(self, rig: Rig):
        reply = f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}]'
        [call] = ask(rig, reply, messages=HISTORY).json()["choices"][0]["message"]["tool_calls"]
        assert len(call["id"]) == 9
        assert "call_1" not in prompt_of(rig)
        ask(rig, "ok", messages=[HISTORY[0], {"role": "assistant", "tool_calls": [call]}])
        assert call["id"] in prompt_of(rig)


def test_calls_of_an_answer(rig: Rig):
    answer = ask(rig, f"Let me see.\n{CALL}\n{NOW}").json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    first, second = choice["message"]["tool_calls"]
    assert first["type"] == "function"
    assert first["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["id"] != second["id"]
    assert ask(rig, CALL).json()["choices"][0]["message"]["content"] is None


def test_an_answer_without_calls(rig: Rig):
    for said in (
        "Rain.",
        "<tool_call>\nnothing",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    ):
        [choice] = ask(rig, said).json()["choices"]
        assert choice["message"]["content"] == said
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
    [choice] = ask(rig, CALL, tools=None).json()["choices"]
    assert choice["message"]["content"] == CALL


def test_a_stream_of_calls_has_the_shape_of_openai(rig: Rig):
    chunks = events(ask(rig, f"Let me see.\n{CALL}{NOW}", stream=True).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    starts = [call for call in calls if "id" in call]
    assert [(c["index"], c["type"], c["function"]) for c in starts] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "now", "arguments": ""}),
    ]
    pieces = [call for call in calls if "id" not in call]
    assert all(
        set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in pieces
    )
    assert "".join(c["function"]["arguments"] for c in pieces if c["index"] == 0) == ARGUMENTS
    assert "".join(c["function"]["arguments"] for c in pieces if c["index"] == 1) == "{}"
    assert len([c for c in pieces if c["index"] == 0]) > 10, "arguments come as they are written"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]
    assert not any(delta.get("content") == "" for delta in deltas)


def test_a_call_that_is_cut_off_keeps_what_came(rig: Rig):
    [choice] = ask(rig, CALL, max_tokens=60).json()["choices"]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"])
    [choice] = ask(rig, CALL, max_tokens=20).json()["choices"]
    assert choice["message"]["content"] == CALL[:20]


def test_log_probabilities_tell_of_calls_too(rig: Rig):
    said = f"See: {CALL}"
    whole = ask(rig, said, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in whole) == said
    chunks = events(ask(rig, said, logprobs=True, stream=True).text)
    told = [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {}).get("content", ())]
    assert "".join(token["token"] for token in told) == said[: len("".join(token["token"] for token in told))]
    assert len(told) >= len(said) - len("}\n</tool_call>")


def grammar_of(rig: Rig, **fields: Any) -> str | None:
    ask(rig, "ok", **fields)
    return rig.engine.submitted[-1].grammar


def test_a_call_that_is_required_is_held_to_its_schema(rig: Rig):
    grammar = grammar_of(rig, tool_choice="required")
    for text in (CALL, NOW, f"{CALL}\n{NOW}"):
        assert allows(grammar, text), text
    for text in (
        "ok",
        CALL.replace("2", '"x"'),
        CALL.replace("weather", "other"),
        CALL.replace('"city": "Oslo", ', ""),
    ):
        assert not allows(grammar, text), text
    assert not allows(grammar_of(rig, tool_choice="required", parallel_tool_calls=False), f"{CALL}\n{NOW}")


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "now"}},
        "now",
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OTHER]}},
    ],
)
def test_a_tool_that_is_named_is_called(rig: Rig, choice: Any):
    grammar = grammar_of(rig, tool_choice=choice)
    assert allows(grammar, NOW)
    assert not allows(grammar, CALL)
    assert not allows(grammar, f"{NOW}\n{NOW}")


def test_what_the_model_may_choose_is_held_to_what_was_asked(rig: Rig):
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]
    grammar = grammar_of(rig, tools=[strict, OTHER])
    for text in ("Rain.", "", CALL, f"Let me see. {CALL}", f"{CALL}\n{NOW}", "a < b"):
        assert allows(grammar, text), text
    assert not allows(grammar, CALL.replace("2", '"x"'))
    once = grammar_of(rig, parallel_tool_calls=False)
    assert allows(once, f"So: {CALL}")
    assert not allows(once, f"{CALL}\n{NOW}")
    formed = grammar_of(rig, response_format={"type": "json_object"})
    assert allows(formed, CALL)
    assert allows(formed, '{"a": 1}')
    assert not allows(formed, "Rain.")


CITY, DAYS = (
    f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in (("city", "Oslo"), ("days", "2"))
)
SYNTAXES = {
    "{{ tools }}[TOOL_CALLS]": (
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]'
    ),
    "{{ tools }}[TOOL_CALLS][ARGS]": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
    '{{ tools }}"parameters": dictionary': (
        f'{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}'
    ),
    "{{ tools }}func_name1(": '[weather(city="Oslo", days=2), now()]',
    "<|tool_list_start|>": '<|tool_call_start|>[weather(city="Oslo", days=2), now()]<|tool_call_end|>',
    "{{ tools }}<tool_call>": f"{CALL}\n{NOW}",
    "{{ tools }}<tool_call><function=": (
        f"<tool_call>\n<function=weather>\n{CITY}{DAYS}</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "{{ tools }}<seed:tool_call><function=": (
        f"<seed:tool_call>\n<function=weather>\n{CITY}{DAYS}</function>\n<function=now>\n</function>\n</seed:tool_call>"
    ),
    "{{ tools }}<arg_key>": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
    ),
}


@pytest.mark.parametrize("template", SYNTAXES)
def test_each_format_is_written_as_it_is_read(config: ServerConfig, template: str):
    written = SYNTAXES[template]
    engine, backend = FakeEngine(info_value=fake_info(9000, 8000)), Backend()
    backend.ready(engine, Templated(template), engine.info_value)
    with TestClient(create_app(backend, config)) as client:
        rig = Rig(client, engine, backend)
        calls = ask(rig, written, tool_choice="required").json()["choices"][0]["message"]["tool_calls"]
        required = engine.submitted[-1].grammar
        ask(rig, written, parallel_tool_calls=False)
        free = engine.submitted[-1].grammar
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": ARGUMENTS},
        {"name": "now", "arguments": "{}"},
    ]
    assert allows(required, written)
    assert not allows(required, "Rain.")
    assert not allows(required, written.replace("2", "x"))
    assert allows(free, "Rain.")
    assert not allows(free, written)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [3]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a\nb"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools[0].function.parameters"),
        *(({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": names}}}]}, "tools[0].function.parameters.required")
          for names in (True, "city", [1])),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tool_choice": "absent"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "absent"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice.allowed_tools.tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}], "tool_choice": "f"}, "tools"),
    ],
)  # fmt: skip
def test_refusals(rig: Rig, fields: dict[str, Any], param: str):
    answer = rig.chat(**{"tools": [TOOL], **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("config", [ServerConfig(disable_grammar_support=True)])
def test_without_grammars_a_model_may_still_choose(rig: Rig):
    assert ask(rig, CALL).json()["choices"][0]["finish_reason"] == "tool_calls"
    assert rig.chat(tools=[TOOL], tool_choice="required").status_code == 400


class TestResponses:
    TOOLS: ClassVar = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]

    def ask(self, rig: Rig, reply: str, **fields: Any) -> Any:
        rig.engine.reply = reply
        answer = rig.post("/v1/responses", **{"input": "a", "tools": self.TOOLS, **fields})
        assert answer.status_code == 200, answer.text
        return answer

    def test_calls_are_items(self, rig: Rig):
        answer = self.ask(rig, f"See.{CALL}").json()
        message, call = answer["output"]
        assert message["content"][0]["text"] == "See."
        assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", ARGUMENTS)
        assert call["status"] == "completed"
        assert call["call_id"]
        assert answer["tools"][0]["name"] == "weather"
        items = [{"role": "user", "content": "a"}, message, call]
        self.ask(
            rig,
            "ok",
            input=[*items, {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}],
        )
        assert prompt_of(rig).partition("[user]a|")[2] == (
            f"[assistant]See.\n{CALL}|[user]<tool_response>\nrain\n</tool_response>|[assistant]"
        )

    def test_a_stream_says_what_the_answer_says(self, rig: Rig):
        told = events(self.ask(rig, f"See.{CALL}", stream=True).text)
        kinds = [event["type"] for event in told]
        deltas = [e["delta"] for e in told if e["type"] == "response.function_call_arguments.delta"]
        assert "".join(deltas) == ARGUMENTS
        assert kinds[-3:] == [
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert [event["sequence_number"] for event in told] == list(range(len(told)))
        [done] = [e for e in told if e["type"] == "response.function_call_arguments.done"]
        assert done["arguments"] == ARGUMENTS
        output = told[-1]["response"]["output"]
        assert [item["type"] for item in output] == ["message", "function_call"]
        assert output[1]["arguments"] == ARGUMENTS

    def test_a_call_can_be_required(self, rig: Rig):
        self.ask(rig, CALL, tool_choice={"type": "function", "name": "weather"})
        assert allows(rig.engine.submitted[-1].grammar, CALL)


class TestMessages:
    TOOLS: ClassVar = [{"name": "weather", "description": "Tells it.", "input_schema": PARAMETERS}]

    def ask(self, rig: Rig, reply: str, **fields: Any) -> Any:
        rig.engine.reply = reply
        body = {"max_tokens": 500, "messages": [{"role": "user", "content": "a"}], "tools": self.TOOLS}
        answer = rig.post("/v1/messages", **{**body, **fields})
        assert answer.status_code == 200, answer.text
        return answer

    def test_calls_are_blocks(self, rig: Rig):
        answer = self.ask(rig, f"See.{CALL}").json()
        text, call = answer["content"]
        assert answer["stop_reason"] == "tool_use"
        assert text == {"type": "text", "text": "See."}
        assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", json.loads(ARGUMENTS))
        result = {
            "type": "tool_result",
            "tool_use_id": call["id"],
            "content": [{"type": "text", "text": "rain"}],
        }
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
        ]
        self.ask(rig, "ok", messages=messages)
        assert prompt_of(rig).partition("[user]a|")[2] == (
            f"[assistant]See.\n{CALL}|[user]<tool_response>\nrain\n</tool_response>|[user]So?|[assistant]"
        )

    def test_a_stream_says_what_the_answer_says(self, rig: Rig):
        told = events(self.ask(rig, f"See.{CALL}", stream=True).text)
        deltas = [e["delta"] for e in told if e["type"] == "content_block_delta"]
        assert "".join(d["partial_json"] for d in deltas if d["type"] == "input_json_delta") == ARGUMENTS
        starts = [e["content_block"] for e in told if e["type"] == "content_block_start"]
        assert [start["type"] for start in starts] == ["text", "tool_use"]
        assert starts[1]["input"] == {}
        assert [e["delta"]["stop_reason"] for e in told if e["type"] == "message_delta"] == ["tool_use"]
        assert [e["type"] for e in told].count("content_block_stop") == 2

    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
    def test_a_call_can_be_required(self, rig: Rig, choice: Any):
        self.ask(rig, CALL, tool_choice=choice)
        grammar = rig.engine.submitted[-1].grammar
        assert allows(grammar, CALL)
        assert not allows(grammar, "Rain.")

    def test_tools_count_as_prompt(self, rig: Rig):
        body = {"messages": [{"role": "user", "content": "a"}]}
        bare = rig.post("/v1/messages/count_tokens", **body).json()["input_tokens"]
        assert (
            rig.post("/v1/messages/count_tokens", **body, tools=self.TOOLS).json()["input_tokens"]
            > bare + 100
        )
