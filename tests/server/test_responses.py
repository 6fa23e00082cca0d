"""/v1/responses against the engine that says the alphabet: values, the order of events, and OpenAI's own client."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from xlane.engine import Overloaded, RequestFailed
from xlane.server.backend import Backend

from ..support.byte_tokenizer import ByteTokenizer, ThinkingTokenizer
from ..support.fake_engine import FakeEngine, fake_info
from ..support.live_server import live_server
from .conftest import Rig


def ask(rig: Rig, input: Any = "a", **fields: Any) -> Any:
    return rig.post("/v1/responses", input=input, **{"max_output_tokens": 4, "temperature": 0, **fields})


def prompt_of(rig: Rig) -> str:
    return bytes(rig.engine.submitted[-1].prompt_ids).decode()


def events(rig: Rig, input: Any = "a", **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; that each is named and numbered is checked."""
    response = ask(rig, input, stream=True, **fields)
    assert response.status_code == 200, response.text
    *blocks, nothing = response.text.split("\n\n")
    assert nothing == ""
    found: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        assert found[-1]["sequence_number"] == number
    return found


def without_ids(value: Any) -> Any:
    """The same without what differs from request to request."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        changing = ("id", "item_id", "created_at", "completed_at")
        return {name: without_ids(item) for name, item in value.items() if name not in changing}
    return value


def test_answer(rig: Rig):
    rig.engine.cached_tokens = 5
    answer = ask(rig, metadata={"a": "b"}, user="u", store=True, reasoning={"effort": None}).json()
    assert (answer["object"], answer["model"], answer["store"]) == ("response", "fake/alphabet", False)
    assert answer["id"].startswith("resp_")
    assert (answer["metadata"], answer["user"]) == ({"a": "b"}, "u")
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert without_ids(answer["output"]) == [
        {
            "type": "message",
            "status": "incomplete",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "abcd", "annotations": [], "logprobs": []}],
        }
    ]
    assert answer["usage"] == {
        "input_tokens": 19,
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 23,
    }
    assert prompt_of(rig) == "[user]a|[assistant]"


def test_an_answer_that_came_to_its_end(rig: Rig):
    rig.engine.reply = "hi"
    answer = ask(rig).json()
    assert (answer["status"], answer["incomplete_details"], answer["error"]) == ("completed", None, None)
    assert answer["output"][0]["status"] == "completed"


def test_input_of_every_kind(rig: Rig):
    items = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {
            "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "text": "3", "annotations": []}],
        },
        {"type": "message", "role": "user", "content": "4"},
    ]  # fmt: skip
    assert ask(rig, items, instructions="i").status_code == 200
    assert prompt_of(rig) == "[system]i|[system]d|[user]12|[assistant]3|[user]4|[assistant]"
    ask(rig, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert prompt_of(rig) == "[user]a|[assistant]b|[assistant]"


def test_parameters_reach_the_engine(rig: Rig):
    ask(rig, temperature=0.5, top_p=0.25, reasoning={"effort": "low", "summary": "auto"})
    sampling = rig.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.25, 4)
    assert prompt_of(rig).startswith("{reasoning_effort=low}")
    ask(rig, max_output_tokens=None)
    assert rig.engine.submitted[1].sampling.max_tokens == 512 - 19


def test_what_asks_for_nothing_is_accepted(rig: Rig):
    nothing = {
        "tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}, "verbosity": "low"}, "store": None,
        "include": ["reasoning.encrypted_content"], "truncation": "disabled", "background": False,
        "parallel_tool_calls": False, "service_tier": "auto", "prompt_cache_key": "k", "previous_response_id": None,
        "stream_options": {"include_obfuscation": False}, "max_tool_calls": None, "text_format": None,
    }  # fmt: skip
    assert ask(rig, **nothing).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": -1}, 400, "top_p"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, 400, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"background": True}, 400, "background"),
        ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f g"}]}, 400, "tools[0].name"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"include": "message.output_text.logprobs"}, 400, "include"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, 400, "top_logprobs"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"input": None}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, 400, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, 400, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, 400, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 400, "input[0].type"),
        ({"input": [{"role": "tool", "content": "a"}]}, 400, "input[0].role"),
        ({"input": [{"role": "user"}]}, 400, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content"),
        ({"input": [{"role": "system", "content": "refuse me"}]}, 400, "input"),
        ({"input": "a" * 450}, 400, "input"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(rig: Rig, fields: dict[str, Any], status: int, param: str, stream: bool):
    response = ask(rig, **{"stream": stream, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error"
    assert rig.engine.submitted == []


def test_the_order_of_events(rig: Rig):
    found = events(rig)
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * 4,
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert found[0]["response"]["status"] == "in_progress"
    placed = [event for event in found if "item_id" in event]
    assert {(e["output_index"], e["content_index"]) for e in placed} == {(0, 0)}
    assert {e["item_id"] for e in placed} == {found[2]["item"]["id"]}
    assert "".join(event["delta"] for event in found if "delta" in event) == "abcd"
    last = found[-1]["response"]
    assert last["id"] == found[0]["response"]["id"]
    assert last["output"] == [found[-2]["item"]]
    assert without_ids(last) == without_ids(ask(rig).json())


def test_an_empty_answer_still_has_an_item(rig: Rig):
    rig.engine.reply = ""
    found = events(rig)
    assert [event["type"].rpartition(".")[0] for event in found].count("response.output_item") == 2
    assert without_ids(found[-1]["response"]) == without_ids(ask(rig).json())


@pytest.mark.parametrize("value", [f"{30**20}", f"{'[' * 190}{']' * 190}", f"{'[' * 900}{']' * 900}"])
@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [{"type": "function", "name": "f", "parameters": {"x": "VALUE"}}]},
        {"tool_choice": {"type": "function", "name": "f", "x": "VALUE"}, "tools": [{"name": "f"}]},
        {"text": {"format": {"type": "text", "x": "VALUE"}}},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_was_asked_for_is_told_whatever_it_holds(rig: Rig, asked: dict[str, Any], value: str):
    rig.backend.ready(rig.engine, ByteTokenizer(), fake_info(9000, 8000))
    rig.engine.reply = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    body = {"input": "a", "max_output_tokens": 99, **asked}
    for stream in (False, True):
        sent = json.dumps({**body, "stream": stream}).replace('"VALUE"', value)
        answer = rig.client.post("/v1/responses", content=sent, headers={"content-type": "application/json"})
        if next(iter(asked)) == "tools" and value.startswith("[" * 200):
            assert answer.status_code == 400, "a schema that deep nobody can follow"
            continue
        assert answer.status_code == 200, answer.text
        assert answer.text.replace(" ", "").count(f'"x":{value}') == (3 if stream else 1)


@pytest.mark.parametrize("stream", [False, True])
def test_overload(rig: Rig, stream: bool):
    rig.engine.refuse_with = Overloaded("the queue is full", 5.0)
    response = ask(rig, stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (429, "5")


def test_a_failure_after_the_first_token_is_the_last_event(rig: Rig):
    rig.engine.fail_with = RequestFailed("NaN")
    *_, done, last = events(rig)
    assert (done["type"], last["type"]) == ("response.output_item.done", "response.failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "NaN"}
    assert last["response"]["output"][0]["content"][0]["text"] == "abc"


class TestThinking:
    @pytest.fixture
    def tokenizer(self) -> ByteTokenizer:
        return ThinkingTokenizer()

    def test_it_is_an_item_of_its_own(self, rig: Rig):
        rig.engine.reply = "why\n</think>\n\nso"
        answer = ask(rig, max_output_tokens=50).json()
        assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
        assert answer["output"][0]["content"] == [{"type": "reasoning_text", "text": "why"}]
        assert answer["output"][1]["content"][0]["text"] == "so"
        assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": 12}
        found = events(rig, max_output_tokens=50)
        assert without_ids(found[-1]["response"]) == without_ids(answer)
        kinds = [event["type"].removeprefix("response.") for event in found]
        start = ["created", "in_progress", "output_item.added", *["reasoning_text.delta"] * 3]
        assert kinds[: len(start) + 3] == [
            *start, "reasoning_text.done", "output_item.done", "output_item.added"
        ]  # fmt: skip
        assert {event["output_index"] for event in found if "output_index" in event} == {0, 1}

    def test_it_can_be_left_out(self, rig: Rig):
        rig.engine.reply = "why</think>so"
        fields = {"max_output_tokens": 50, "include_reasoning": False}
        answer = ask(rig, **fields).json()
        assert [item["type"] for item in answer["output"]] == ["message"]
        assert without_ids(events(rig, **fields)[-1]["response"]) == without_ids(answer)

    def test_an_end_amid_thoughts(self, rig: Rig):
        rig.engine.reply = "whyever"
        answer = ask(rig, max_output_tokens=3).json()
        assert [(item["type"], item["status"]) for item in answer["output"]] == [("reasoning", "incomplete")]
        assert without_ids(events(rig, max_output_tokens=3)[-1]["response"]) == without_ids(answer)


@pytest.mark.clients
class TestClient:
    """OpenAI's client, on a model that thinks; the other one is in tests/e2e."""

    FIELDS: Any = {"model": "fake/alphabet", "input": "a", "max_output_tokens": 50}  # noqa: RUF012

    @pytest.fixture
    def url(self) -> Iterator[str]:
        engine, backend = FakeEngine(reply="why</think>so"), Backend()
        backend.ready(engine, ThinkingTokenizer(), engine.info_value)
        with live_server(backend) as server:
            yield f"{server.url}/v1"

    def test_whole_and_streamed(self, url: str):
        from openai import OpenAI

        with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            answer = client.responses.create(**self.FIELDS)
            assert answer.output_text == "so"
            thought = answer.output[0]
            assert thought.type == "reasoning"
            assert thought.content
            assert thought.content[0].text == "why"
            with client.responses.stream(**self.FIELDS) as stream:
                texts = [event.delta for event in stream if event.type == "response.reasoning_text.delta"]
                assert "".join(texts) == "why"
                assert stream.get_final_response().output_text == "so"
            # What was answered can be sent back.
            history: Any = [
                {"role": "user", "content": "a"},
                *answer.output,
                {"role": "user", "content": "b"},
            ]
            again = client.responses.create(**{**self.FIELDS, "input": history})
            assert again.output_text == "so"

    def test_async(self, url: str):
        from openai import AsyncOpenAI

        async def main() -> str:
            async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                stream = await client.responses.create(**self.FIELDS, stream=True)
                return "".join(
                    [event.delta async for event in stream if event.type == "response.output_text.delta"]
                )

        assert asyncio.run(main()) == "so"


def test_metadata_that_could_not_be_answered_is_refused(rig: Rig):
    assert ask(rig, metadata={"a": "b"}).json()["metadata"] == {"a": "b"}
    assert ask(rig, metadata={"a": 2**64}).status_code == 400
