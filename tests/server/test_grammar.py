"""What requests ask of an answer's form → one grammar in the engine's request, or a refusal that names what is wrong."""

import asyncio
import json
import threading
from typing import Any

import pytest

from xlane.engine.grammar_bounds import MAX_LINKS, MAX_OPTIONAL
from xlane.server import grammars
from xlane.server.config import ServerConfig
from xlane.server.errors import Invalid

from ..support.byte_tokenizer import ByteTokenizer, ThinkingTokenizer
from ..support.obedient import allows
from .conftest import Rig

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GOOD, INDENTED, BAD = '{"a":1}', '{\n  "a": 1\n}', '{"a":"x"}'

JSON_FORMS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"grammar": {"type": "json", "value": SCHEMA}}),
    ("/generate", {"grammar": {"type": "json", "value": json.dumps(SCHEMA)}}),
    ("/generate", {"grammar": {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}}),
    ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}}),
    ("/v1/chat/completions", {"response_format": {"type": "json_object", "schema": SCHEMA}}),
    ("/v1/chat/completions", {"response_format": {"type": "json_object", "value": SCHEMA}}),
    ("/v1/chat/completions", {"guided_json": SCHEMA}),
    ("/v1/chat/completions", {"structured_outputs": {"json": SCHEMA, "regex": None}}),
    ("/v1/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}),
    ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    ("/v1/messages", {"output_format": {"type": "json_schema", "schema": SCHEMA}}),
]  # fmt: skip
OTHERS: list[tuple[str, dict[str, Any], str, str]] = [
    ("/generate", {"grammar": {"type": "regex", "value": r"[a-c]/\d"}}, "b/7", "d/7"),
    ("/v1/chat/completions", {"response_format": {"type": "regex", "value": "a+"}}, "aa", "b"),
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, '{"x": [null]}', "[1]"),
    ("/v1/chat/completions", {"guided_regex": "a+"}, "aa", "b"),
    ("/v1/chat/completions", {"guided_choice": ['a"b', "é\n"]}, "é\n", "e"),
    ("/v1/completions", {"guided_grammar": 'root ::= "a" | "b"'}, "b", "c"),
    ("/v1/completions", {"guided_grammar": 'start: "a" /[0-9]/'}, "a1", "c"),
    ("/v1/completions", {"structured_outputs": {"choice": ["x", "y"]}}, "y", "z"),
    ("/v1/completions", {"structured_outputs": {"json_object": True}}, "{}", "z"),
    ("/v1/responses", {"text": {"format": {"type": "json_object"}}}, "{}", "z"),
]


def ask(rig: Rig, path: str, fields: dict[str, Any]) -> Any:
    if path == "/generate":
        return rig.generate(**fields)
    messages = [{"role": "user", "content": "a"}]
    body = {
        "/v1/chat/completions": {"messages": messages},
        "/v1/completions": {"prompt": "a", "max_tokens": 4},
        "/v1/responses": {"input": "a"},
        "/v1/messages": {"messages": messages, "max_tokens": 9},
    }[path]
    return rig.post(path, **{**body, **fields})


@pytest.mark.parametrize(("path", "fields"), JSON_FORMS)
def test_a_schema_reaches_the_engine(rig: Rig, path: str, fields: dict[str, Any]):
    assert ask(rig, path, fields).status_code == 200
    grammar = rig.engine.submitted[-1].grammar
    assert allows(grammar, GOOD)
    assert allows(grammar, INDENTED)
    for text in (BAD, "{}", "x", '{"a":1,"b":2}', GOOD + "x"):
        assert not allows(grammar, text), text


@pytest.mark.parametrize(("path", "fields", "good", "bad"), OTHERS)
def test_every_other_form_reaches_the_engine(
    rig: Rig, path: str, fields: dict[str, Any], good: str, bad: str
):
    assert ask(rig, path, fields).status_code == 200
    grammar = rig.engine.submitted[-1].grammar
    assert allows(grammar, good)
    assert not allows(grammar, bad)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/generate", {"grammar": None}),
        ("/v1/chat/completions", {"response_format": {"type": "text"}, "structured_outputs": {}}),
        ("/v1/responses", {"text": {"format": {"type": "text"}}}),
    ],
)
def test_nothing_asked_is_no_grammar(rig: Rig, path: str, fields: dict[str, Any]):
    assert ask(rig, path, fields).status_code == 200
    assert rig.engine.submitted[-1].grammar is None


def test_white_space_is_bounded(rig: Rig):
    ask(rig, "/v1/chat/completions", {"guided_json": SCHEMA})
    grammar = rig.engine.submitted[-1].grammar
    assert allows(grammar, "{\n" + " " * 24 + '"a": 1}')
    assert not allows(grammar, "{\n" + " " * 25 + '"a": 1}')
    assert not allows(grammar, '{\n\n"a": 1}')


COMPOSED = [
    ({"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {}}, "required": ["b"]}]}, '{"a":1,"b":2}'),
    ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}, "required": ["b"]}]}, '{"a":1,"b":2}'),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, '{"a":1,"b":2}'),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"]}, '{"a":1,"b":"x"}'),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "3"),
    ({"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}, '{"n":{"n":{}}}'),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "text"), COMPOSED)
def test_schemas_that_compose_keep_what_matches(rig: Rig, schema: Any, text: str):
    assert ask(rig, "/v1/chat/completions", {"guided_json": schema}).status_code == 200
    assert allows(rig.engine.submitted[-1].grammar, text)


def test_what_lists_properties_is_an_object(rig: Rig):
    """As TGI's documentation writes its schemas."""
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert rig.generate(grammar={"type": "json", "value": schema}).status_code == 200
    grammar = rig.engine.submitted[-1].grammar
    assert allows(grammar, '{"a": 1}')
    assert not any(allows(grammar, text) for text in ('"a"', "1", "[]", "null", "{}"))
    assert (
        rig.generate(grammar={"type": "json", "value": {**schema, "type": ["object", "null"]}}).status_code
        == 200
    )
    assert allows(rig.engine.submitted[-1].grammar, "null")


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"type": "strin"}, "strin"),
        ({"properties": {"a": {}}, "required": [["a"]]}, "required"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"$ref": "http://example.com/x"}, "http://example.com/x"),
        ({"enum": [f"value {i}" for i in range(100)] * 200}, "--limit max_grammar_bytes"),
        ({"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(MAX_LINKS + 1)}}, f"at most {MAX_LINKS}"),
        ({"properties": {f"p{i}": {"type": "null"} for i in range(MAX_OPTIONAL + 1)}}, f"{MAX_OPTIONAL + 1} optional properties; at most {MAX_OPTIONAL}"),
        ("{", "JSON"),
        (7, "object"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [ServerConfig(max_grammar_bytes=100_000)])
def test_a_bad_schema_is_refused_and_its_keyword_named(rig: Rig, schema: Any, word: str):
    tgi = rig.generate(grammar={"type": "json", "value": schema})
    assert tgi.status_code == 422
    assert tgi.json()["error_type"] == "validation"
    assert tgi.json()["error"].startswith("Input validation error: ")
    assert word in tgi.json()["error"]
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for stream in (False, True):
        openai = rig.chat(response_format=form, stream=stream)
        assert openai.status_code == 400
        assert openai.json()["error"]["param"] == "response_format.json_schema.schema"
        assert word in openai.json()["error"]["message"]
    assert rig.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= b"}, "guided_grammar"),
        ({"guided_grammar": "start: b"}, "guided_grammar"),
        (
            {"guided_grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(20_000))},
            "guided_grammar",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": 3}, "structured_outputs"),
    ],
)
def test_a_bad_form_is_refused_by_name(rig: Rig, fields: dict[str, Any], param: str):
    for answer in (rig.chat(**fields), rig.complete(**fields)):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("config", [ServerConfig(disable_grammar_support=True)])
def test_grammars_can_be_switched_off(rig: Rig):
    refused = rig.generate(grammar={"type": "json", "value": SCHEMA})
    assert refused.status_code == 422
    assert refused.json()["error"] == "Input validation error: grammar is not supported"
    assert rig.chat(response_format={"type": "json_object"}).status_code == 400
    assert rig.chat().status_code == 200


class TestThinking:
    @pytest.fixture
    def tokenizer(self) -> ByteTokenizer:
        return ThinkingTokenizer()

    def test_a_model_that_thinks_does_so_before_what_is_asked_of_its_answer(self, rig: Rig):
        rig.chat(response_format={"type": "json_object"})
        opened = rig.engine.submitted[-1].grammar
        assert allows(opened, "let me see</think>\n\n{}")
        assert not allows(opened, "{}")
        rig.chat(response_format={"type": "json_object"}, chat_template_kwargs={"enable_thinking": False})
        free = rig.engine.submitted[-1].grammar
        assert allows(free, "<think>\nlet me see\n</think>\n\n{}")
        assert allows(free, "{}")
        assert not allows(free, "let me see")


def test_a_form_holds_for_all_choices(rig: Rig):
    rig.chat(response_format={"type": "json_object"}, n=3)
    assert len({request.grammar for request in rig.engine.submitted}) == 1
    assert len(rig.engine.submitted) == 3


def test_a_grammar_that_takes_too_long_is_refused_and_holds_up_nobody():
    slow, done = threading.Event(), []

    async def scenario() -> None:
        checks = grammars.Grammars(100_000, 0.05)
        try:
            with pytest.raises(Invalid, match=r"`g` takes longer than 0\.05 s"):
                await checks.check(lambda: str(slow.wait(60)), "g")
            done.append(True)
        finally:
            slow.set()
            checks.close()

    asyncio.run(scenario())
    assert done


def test_a_grammar_that_was_right_is_not_checked_again(monkeypatch: pytest.MonkeyPatch):
    looked: list[str] = []
    monkeypatch.setattr(grammars, "check_grammar", looked.append)
    good, other = (json.dumps({"grammars": [{"lark_grammar": f'start: "{text}"'}]}) for text in "ab")

    async def scenario() -> None:
        checks = grammars.Grammars(100_000, 5.0)
        for text in (good, other, good, other):
            assert await checks.check(lambda text=text: text, "g") == text
        checks.close()

    asyncio.run(scenario())
    # A thread of an earlier test's server may still be at its work.
    assert [text for text in looked if text in (good, other)] == [good, other]
