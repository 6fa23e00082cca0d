"""Grammars of calls in tags: what they allow is what the schema of each argument says, and reads back as that."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from xlane.server.call_rules import CallRules
from xlane.server.errors import Invalid
from xlane.server.grammar import Grammar
from xlane.server.tool_formats import GLM, PYTHON, QWEN_CODER, ToolFormat
from xlane.server.tool_parser import CallArguments, ToolParser
from xlane.server.tools import Tool, ToolUse

from ..support.byte_tokenizer import END_OF_TURN, SPECIAL, ByteTokenizer
from ..support.obedient import TOKENIZER, allows, obedient_ids
from .conftest import Rig
from .test_tool_parser import coder, glm
from .test_tools import PARAMETERS, Templated, ask, events, rig

__all__ = ["rig"]


def grammar_of(form: ToolFormat, schema: dict[str, Any]) -> str:
    tools = (Tool("f", parameters=schema),)
    calls = CallRules(form, ToolUse(tools, "required", tools), ByteTokenizer())
    return Grammar(f"start: answer\n{calls.required()}\n", calls.parts).text()


WORD = {"$defs": {"word": {"type": "string", "minLength": 2}}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, ["", "a", 'a "b"\n{', "<b>"], []),
        ({"type": "integer"}, ["5", "-1"], ["five", "5.5", ""]),
        ({"type": "boolean"}, ["true"], ["True", "yes"]),
        ({"type": "array", "items": {"type": "integer"}}, ["[1, 2]"], ["1", '["a"]']),
        ({"enum": ["a", "b c", 3]}, ["a", "b c", "3"], ["c", '"a"', "4"]),
        ({"const": "x"}, ["x"], ["y"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "a\nb"], ["a", "abcd"]),
        ({"type": "string", "pattern": "^a+$"}, ["a", "aaa"], ["", "ab"]),
        ({"type": "string", "pattern": "b"}, ["abc", "b"], ["ac"]),
        ({"type": "string", "pattern": "^a://b$"}, ["a://b"], ["a:b", "b"]),
        ({"type": "string", "pattern": r"^a:\/\/b$"}, ["a://b"], ["a:b", r"a:\/\/b"]),
        ({"type": "string", "pattern": r"^\\/$"}, [r"\/"], ["/"]),
        ({"$ref": "#/$defs/word"}, ["ab"], ["a"]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["5", "null"], ["a"]),
        ({"anyOf": [*[{"$ref": "#/$defs/word"}] * 2, {"type": "null"}]}, ["ab", "null"], ["a"]),
        ({"type": ["string", "null"]}, ["null", "a"], []),
        ({}, ["a", "5"], []),
    ],
)
def test_a_value_is_held_to_its_schema(schema: dict[str, Any], good: list[str], bad: list[str]):
    tool = {"type": "object", "properties": {"a": schema}, "required": ["a"], **WORD}
    for form, written in ((QWEN_CODER, coder), (GLM, glm)):
        grammar = grammar_of(form, tool)
        for value in good:
            text = written("f", a=value)
            assert allows(grammar, text), text
            jsonschema.validate(arguments_of(form, text, tool), tool)
        for value in bad:
            assert not allows(grammar, written("f", a=value)), value
        assert not allows(grammar, written("f"))
        assert not allows(grammar, written("f", b="1"))


def arguments_of(form: ToolFormat, text: str, schema: dict[str, Any]) -> Any:
    pieces = ToolParser(form, {"f": schema}).push(text, end=True)
    return json.loads("".join(piece.text for piece in pieces if isinstance(piece, CallArguments)))


@pytest.mark.parametrize("form", [QWEN_CODER, GLM])
def test_what_a_model_is_brought_to_write_is_valid(form: ToolFormat):
    schema = {
        "type": "object",
        "properties": {"s": {"type": "string", "maxLength": 3}, "n": {"type": "integer", "maximum": 99}, "o": {"type": "object"}},
        "required": ["s", "n", "o"],
    }  # fmt: skip
    text = bytes(i for i in obedient_ids(grammar_of(form, schema), 400) if i < 256).decode(errors="replace")
    jsonschema.validate(arguments_of(form, text, schema), schema)


@pytest.mark.parametrize("parallel", [False, True])
def test_tags_that_are_control_tokens_are_written_as_such(parallel: bool):
    mark = SPECIAL[END_OF_TURN]

    class Marked(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [END_OF_TURN] if text == mark else super().encode(text, add_special_tokens)

    assert GLM.tags is not None
    form = replace(GLM, tags=replace(GLM.tags, value_close=mark))
    tools = (
        Tool(
            "f", parameters={"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "null"}}}
        ),
    )
    calls = CallRules(form, ToolUse(tools, "auto", tools, parallel), Marked())
    grammar = Grammar(f"start: answer\n{calls.chosen()}\n", calls.parts).text()
    ids: list[int] = []
    for piece in (
        "So: <tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x",
        "\n<arg_key>n</arg_key>\n<arg_value>null",
    ):
        ids += [*piece.encode(), END_OF_TURN]
    matcher = LLMatcher(TOKENIZER, grammar)
    assert matcher.try_consume_tokens([*ids, *b"\n</tool_call>"]) == len(ids) + len(b"\n</tool_call>")
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    "definitions",
    [
        {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 100}},
        {a: {"anyOf": [{"$ref": f"#/$defs/{b}"}] * 100} for a, b in pairwise("abcdefgh")} | {"h": {"type": "string"}},
    ],
)  # fmt: skip
def test_references_that_are_many_take_linear_time(definitions: dict[str, Any]):
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": definitions}
    for form, written in ((QWEN_CODER, coder), (GLM, glm)):
        text = written("f", x="word")
        assert allows(grammar_of(form, schema), text)
        assert arguments_of(form, text, schema) == {"x": "word"}


@pytest.mark.parametrize("form", [QWEN_CODER, PYTHON])
def test_definitions_that_every_argument_takes_along_are_refused_before_they_are_much(form: ToolFormat):
    definitions = {"d": {"type": "integer", "description": "x" * 10_000}}
    properties = {f"p{i}": {"type": "array", "items": {"$ref": "#/$defs/d"}} for i in range(200)}
    with pytest.raises(Invalid, match="more than 1048576 bytes"):
        grammar_of(form, {"type": "object", "properties": properties, "$defs": definitions})


def test_a_tool_that_names_no_arguments_takes_any():
    grammar = grammar_of(QWEN_CODER, {"type": "object"})
    for text in (coder("f"), coder("f", a="1", other="x")):
        assert allows(grammar, text), text


def test_a_name_that_cannot_be_written_is_refused():
    with pytest.raises(Invalid, match="cannot write"):
        grammar_of(GLM, {"type": "object", "properties": {"a<b": {"type": "string"}}})


class TestAnswers:
    @pytest.fixture
    def tokenizer(self) -> ByteTokenizer:
        return Templated("{{ tools }}<tool_call><function=")

    @pytest.mark.parametrize(
        "tags", ["</function>\n", "</function>\n</tool_call>", "</parameter>\n</function>\n</tool_call>"]
    )
    def test_a_call_whose_end_is_forgotten_has_arguments_in_json(self, rig: Rig, tags: str):
        reply = coder("weather", city="Oslo").replace(tags, "")
        [choice] = ask(rig, reply).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
        deltas = [chunk["choices"][0]["delta"] for chunk in events(ask(rig, reply, stream=True).text)]
        calls = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls") or ()]
        assert "".join(calls) == '{"city": "Oslo"}'
        tool = {"name": "weather", "input_schema": PARAMETERS}
        body = {"max_tokens": 500, "messages": [{"role": "user", "content": "a"}], "tools": [tool]}
        assert rig.post("/v1/messages", **body).json()["content"][0]["input"] == {"city": "Oslo"}

    def test_a_call_that_is_cut_off_is_left_open(self, rig: Rig):
        [choice] = ask(rig, coder("weather", city="Oslo"), max_tokens=50).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Os'
