"""/v1/messages against the engine that says the alphabet: values, the order of events, and Anthropic's own client."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from xlane.engine import Overloaded, RequestFailed
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer, ThinkingTokenizer
from ..support.fake_engine import FakeEngine, fake_info
from ..support.live_server import live_server
from .conftest import Rig

USER = {"role": "user", "content": "a"}
PATHS = ("/v1/messages", "/v1/messages/count_tokens")


def ask(rig: Rig, messages: Any = (USER,), **fields: Any) -> Any:
    return rig.post("/v1/messages", messages=messages, **{"max_tokens": 4, "temperature": 0, **fields})


def prompt_of(rig: Rig) -> str:
    return bytes(rig.engine.submitted[-1].prompt_ids).decode()


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; that each is named is checked."""
    *blocks, nothing = text.split("\n\n")
    assert nothing == ""
    found: list[dict[str, Any]] = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def events(rig: Rig, messages: Any = (USER,), **fields: Any) -> list[dict[str, Any]]:
    response = ask(rig, messages, stream=True, **fields)
    assert response.status_code == 200, response.text
    return events_of(response.text)


def test_answer(rig: Rig):
    rig.engine.cached_tokens = 5
    answer = ask(rig).json()
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "fake/alphabet",
        "content": [{"type": "text", "text": "abcd"}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 14,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 5,
            "output_tokens": 4,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }
    assert prompt_of(rig) == "[user]a|[assistant]"


def test_system_and_messages_of_every_kind(rig: Rig):
    text = {"type": "text", "text": "1", "cache_control": {"type": "ephemeral"}}
    thought = {"type": "thinking", "thinking": "t", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    messages = [
        {"role": "user", "content": [text, text]},
        {"role": "assistant", "content": [thought, hidden, text]},
        {"role": "user", "content": "2"},
    ]
    billing = {"type": "text", "text": "x-anthropic-billing-header: cch=1;"}
    assert ask(rig, messages, system=[billing, text, text], metadata={"user_id": "u"}).status_code == 200
    assert prompt_of(rig) == "[system]1\n1|[user]11|[assistant]1|[user]2|[assistant]"
    ask(rig, system="s")
    assert prompt_of(rig) == "[system]s|[user]a|[assistant]"


def test_a_last_message_of_the_assistant_is_gone_on_with(rig: Rig):
    answer = ask(rig, [USER, {"role": "assistant", "content": "wxy"}], max_tokens=2).json()
    assert prompt_of(rig) == "[user]a|[assistant]wxy"
    assert answer["content"][0]["text"] == "za"


def test_parameters_reach_the_engine(rig: Rig):
    ask(
        rig,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        thinking={"type": "disabled"},
        output_config={"effort": "low"},
    )
    sampling = rig.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 3)
    assert prompt_of(rig).startswith("{enable_thinking=False}{reasoning_effort=low}{thinking=False}[user]")
    ask(rig, thinking={"type": "enabled", "budget_tokens": 1024})
    assert prompt_of(rig).startswith("{enable_thinking=True}{thinking=True}[user]")


def test_why_it_ended(rig: Rig):
    def ending(**fields: Any) -> tuple[str, str | None, str]:
        answer = ask(rig, **fields).json()
        *_, delta, stop = events(rig, **fields)
        assert (delta["type"], stop["type"]) == ("message_delta", "message_stop")
        assert delta["usage"] == answer["usage"]
        assert delta["delta"] == {name: answer[name] for name in ("stop_reason", "stop_sequence")}
        return answer["stop_reason"], answer["stop_sequence"], answer["content"][0]["text"]

    assert ending(max_tokens=20, stop_sequences=["zz", "de", "e"]) == ("stop_sequence", "de", "abc")
    assert ending(max_tokens=2) == ("max_tokens", None, "ab")
    room = 512 - len("[user]a|[assistant]")
    assert ending(max_tokens=room)[0] == "max_tokens"
    assert ending(max_tokens=10_000)[0] == "model_context_window_exceeded"
    rig.engine.reply = "hi"
    assert ending(max_tokens=20) == ("end_turn", None, "hi")
    rig.engine.reply = ""
    assert ending(max_tokens=20) == ("end_turn", None, "")


def test_the_order_of_events(rig: Rig):
    rig.engine.cached_tokens = 5
    found = events(rig)
    assert [event["type"] for event in found] == [
        "message_start", "content_block_start", *["content_block_delta"] * 4, "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    start = found[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert (start["usage"]["input_tokens"], start["usage"]["cache_read_input_tokens"]) == (14, 5)
    assert found[1]["content_block"] == {"type": "text", "text": ""}
    assert "".join(e["delta"]["text"] for e in found if e["type"] == "content_block_delta") == "abcd"


def test_silence_is_broken_by_pings_but_never_before_the_start():
    engine, backend = FakeEngine(first_delay_s=0.5), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, ServerConfig(sse_keep_alive_s=0.1)) as server:
        import httpx

        body = {"messages": [USER], "max_tokens": 2, "stream": True}
        kinds = [
            event["type"]
            for event in events_of(httpx.post(f"{server.url}/v1/messages", json=body, timeout=10).text)
        ]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds.count("message_start") == 1


def test_count_tokens(rig: Rig):
    body = {"messages": [USER], "system": "s", "tools": []}
    assert rig.post("/v1/messages/count_tokens", **body).json() == {
        "input_tokens": len("[system]s|[user]a|[assistant]")
    }
    assert rig.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "claude"}, 404),
        ({"messages": []}, 400),
        ({"messages": None}, 400),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400),
        ({"messages": [{"role": "user", "content": None}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, 400),
        ({"system": [{"type": "image"}]}, 400),
        ({"system": "refuse me"}, 400),
        ({"tools": [{"name": "f g", "input_schema": {}}]}, 400),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, 400),
        ({"tool_choice": {"type": "any"}}, 400),
        ({"thinking": {"type": "loudly"}}, 400),
        ({"output_config": {"format": {"type": "xml"}}}, 400),
        ({"output_config": {"format": {"type": "json_schema"}}}, 400),
        ({"output_format": {"type": "json_schema"}}, 400),
        ({"output_format": {"type": "json_object"}, "output_config": {"format": {"type": "text"}}}, 400),
        ({"mcp_servers": [{"type": "url"}]}, 400),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_refusals(rig: Rig, path: str, fields: dict[str, Any], status: int):
    response = rig.post(path, **{"messages": [USER], "max_tokens": 4, **fields})
    assert_error(response, status)
    name = next(iter(fields))
    if response.json()["error"]["type"] != "not_found_error" and fields[name] and name != "system":
        assert f"`{name}" in response.json()["error"]["message"] or f"$.{name}" in response.text


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},
        {"max_tokens": 0},
        {"temperature": 3},
        {"top_k": -2},
        {"stop_sequences": ["z"] * 65},
        {"stop_sequences": [""]},
        {"messages": [{"role": "user", "content": "a" * 450}]},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_a_generation(rig: Rig, fields: dict[str, Any], stream: bool):
    assert_error(ask(rig, **{"messages": [USER], "stream": stream, **fields}), 400)


def test_tools_that_may_not_be_called_are_ignored(rig: Rig):
    tools = [{"name": "f", "input_schema": {}}]
    assert ask(rig, tools=tools, tool_choice={"type": "none"}).status_code == 200


def test_more_tools_and_stops_than_openai_takes(rig: Rig):
    tools = [{"name": f"t{i}", "input_schema": {}} for i in range(129)]
    body = {"messages": [USER], "tools": tools, "stop_sequences": list("VWXYZ"), "max_tokens": 4}
    rig.engine.info_value = fake_info(20_000, 16_000)
    rig.backend.ready(rig.engine, ByteTokenizer(), rig.engine.info_value)
    assert rig.post("/v1/messages", **body).status_code == 200


@pytest.mark.parametrize(
    "arguments", [f'{{"n": {30**20}}}', '{"n": "\\ud83d"}', f'{{"n": {"[" * 300}{"]" * 300}}}', '{"n": NaN}']
)
def test_whatever_a_model_writes_as_arguments_is_told(rig: Rig, arguments: str):
    rig.backend.ready(rig.engine, ByteTokenizer(), fake_info(9000, 8000))
    rig.engine.reply = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    fields: Any = {"max_tokens": 900, "tools": [{"name": "f", "input_schema": {}}]}
    [call] = ask(rig, **fields).json()["content"]
    assert call["input"] == json.loads(arguments.replace("NaN", "null"))
    deltas = [event["delta"] for event in events(rig, **fields) if event["type"] == "content_block_delta"]
    assert "".join(delta["partial_json"] for delta in deltas) == arguments


def assert_error(response: Any, status: int) -> None:
    kinds = {
        400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
        405: "invalid_request_error", 413: "request_too_large", 415: "invalid_request_error",
        429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
    }  # fmt: skip
    body = response.json()
    assert response.status_code == status, body
    assert (set(body), body["type"]) == ({"type", "error"}, "error")
    assert (set(body["error"]), body["error"]["type"]) == ({"type", "message"}, kinds[status])
    assert response.headers["request-id"] == response.headers["x-request-id"]


def test_too_long_is_said_in_the_words_clients_look_for(rig: Rig):
    for length in (450, 400_000):
        error = ask(rig, [{"role": "user", "content": "a" * length}]).json()["error"]
        assert error["message"].startswith("prompt is too long: ")


@pytest.mark.parametrize("path", PATHS)
def test_every_error_has_the_shape(rig: Rig, path: str):
    json_type = {"content-type": "application/json"}
    assert_error(rig.client.post(path, content=b"{", headers=json_type), 400)
    assert_error(rig.client.post(path, content=b"{}", headers=json_type), 400)
    assert_error(rig.client.post(path, content=b"a", headers={"content-type": "text/plain"}), 415)
    assert_error(rig.client.post(path, content=b" " * 3_000_000, headers=json_type), 413)
    assert_error(rig.client.get(path), 405)
    rig.backend.down("restarting the engine")
    assert_error(rig.post(path, messages=[USER], max_tokens=1), 503)


@pytest.mark.parametrize("path", ["/v1/messages/batches", "/v1/messages/batches/1"])
def test_routes_that_are_not_there(rig: Rig, path: str):
    assert_error(rig.client.get(path), 404)


@pytest.mark.parametrize("stream", [False, True])
def test_failures(rig: Rig, stream: bool):
    rig.engine.refuse_with = Overloaded("the queue is full", 5.0)
    assert_error(ask(rig, stream=stream), 429)
    rig.engine.refuse_with = RequestFailed("NaN")
    assert_error(ask(rig, stream=stream), 500)


def test_a_failure_after_the_first_token_is_the_last_event(rig: Rig):
    rig.engine.fail_with = RequestFailed("NaN")
    *_, before, last = events(rig)
    assert before["type"] == "content_block_delta"
    assert last == {"type": "error", "error": {"type": "api_error", "message": "NaN"}}


class TestKey:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(api_key="secret")

    @pytest.mark.parametrize("path", PATHS)
    def test_either_header(self, rig: Rig, path: str):
        body = {"messages": [USER], "max_tokens": 1}
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            assert rig.client.post(path, json=body, headers=headers).status_code == 200
        for headers in ({}, {"x-api-key": "other"}, {"authorization": "Bearer other"}):
            assert_error(rig.client.post(path, json=body, headers=headers), 401)

    def test_only_here(self, rig: Rig):
        body = {"prompt": "a"}
        assert (
            rig.client.post("/v1/completions", json=body, headers={"x-api-key": "secret"}).status_code == 401
        )


class TestThinking:
    @pytest.fixture
    def tokenizer(self) -> ByteTokenizer:
        return ThinkingTokenizer()

    def test_it_is_a_block_of_its_own(self, rig: Rig):
        rig.engine.reply = "why\n</think>\n\nso"
        answer = ask(rig, max_tokens=50).json()
        assert answer["content"] == [
            {"type": "thinking", "thinking": "why", "signature": ""},
            {"type": "text", "text": "so"},
        ]
        assert answer["usage"]["output_tokens_details"] == {"thinking_tokens": 12}
        found = events(rig, max_tokens=50)
        blocks = [event for event in found if event["type"].startswith("content_block")]
        kinds = [event.get("delta", event.get("content_block", event))["type"] for event in blocks]
        assert kinds == [
            "thinking", *["thinking_delta"] * 3, "signature_delta", "content_block_stop",
            "text", *["text_delta"] * 2, "content_block_stop",
        ]  # fmt: skip
        assert [event["index"] for event in blocks] == [0] * 6 + [1] * 4

    def test_it_is_not_told_when_it_is_switched_off(self, rig: Rig):
        rig.engine.reply = "<think>why</think>so"
        fields: Any = {"max_tokens": 50, "thinking": {"type": "disabled"}}
        assert ask(rig, **fields).json()["content"] == [{"type": "text", "text": "so"}]
        assert not any("thinking" in str(event.get("delta")) for event in events(rig, **fields))


@pytest.mark.clients
class TestClient:
    """Anthropic's client, on a model that thinks; the other one is in tests/e2e."""

    FIELDS: Any = {"model": "fake/alphabet", "messages": [USER], "max_tokens": 200}  # noqa: RUF012

    @pytest.fixture
    def engine(self) -> FakeEngine:
        return FakeEngine(fake_info(2000, 1500), reply="why</think>so")

    @pytest.fixture
    def url(self, engine: FakeEngine) -> Iterator[str]:
        backend = Backend()
        backend.ready(engine, ThinkingTokenizer(), engine.info_value)
        with live_server(backend, ServerConfig(api_key="secret", sse_keep_alive_s=0.1)) as server:
            yield server.url

    def test_whole_and_streamed(self, url: str):
        from anthropic import Anthropic

        with Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
            answer = client.messages.create(**self.FIELDS)
            assert [block.type for block in answer.content] == ["thinking", "text"]
            with client.messages.stream(**self.FIELDS) as stream:
                assert "".join(stream.text_stream) == "so"
                final = stream.get_final_message()
            assert [block.type for block in final.content] == ["thinking", "text"]
            assert final.usage == answer.usage
            assert final.stop_reason == "end_turn"
            # What was answered can be sent back.
            history: Any = [USER, {"role": "assistant", "content": answer.content}, USER]
            assert client.messages.create(**{**self.FIELDS, "messages": history}).content == answer.content

    def test_a_slow_start(self, engine: FakeEngine, url: str):
        from anthropic import Anthropic

        engine.first_delay_s = 0.4
        with (
            Anthropic(base_url=url, api_key="secret", max_retries=0) as client,
            client.messages.stream(**self.FIELDS) as stream,
        ):
            assert stream.get_final_text() == "so"

    @pytest.mark.parametrize("stream", [False, True])
    def test_the_tool_runner_sends_whole_conversations(self, engine: FakeEngine, url: str, stream: bool):
        import anthropic

        @anthropic.beta_tool
        def weather(city: str) -> str:
            """Tells the weather."""
            return f"Rain in {city}."

        call = {"name": "weather", "arguments": {"city": "Oslo"}}
        engine.reply = f"why</think><tool_call>{json.dumps(call)}</tool_call>"
        with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
            runner: Any = client.beta.messages.tool_runner(**self.FIELDS, tools=[weather], stream=stream)
            for turn in runner:
                told = turn.get_final_message() if stream else turn
                engine.reply = "why</think>so"
        assert told.content[-1].text == "so"
        prompt = bytes(engine.submitted[-1].prompt_ids).decode()
        assert "[user]a|[assistant]" in prompt
        assert prompt.index("[user]a|") < prompt.index("Rain in Oslo.")

    def test_a_thread_that_is_asked_for_is_refused(self, url: str):
        import anthropic

        with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
            body = {"thread": {"type": "create"}}
            with pytest.raises(anthropic.BadRequestError, match="`thread`") as refused:
                client.messages.create(**self.FIELDS, extra_body=body)
        assert refused.value.body["error"]["details"] == {"error_code": "thread_unsupported_request"}

    def test_errors_are_the_clients_own(self, engine: FakeEngine, url: str):
        import anthropic

        with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as wrong:
                client.messages.create(**self.FIELDS)
            assert wrong.value.request_id
        engine.fail_with = RequestFailed("NaN")
        with anthropic.Anthropic(base_url=url, auth_token="secret", max_retries=0) as client:
            with (
                pytest.raises(anthropic.APIStatusError, match="NaN"),
                client.messages.stream(**self.FIELDS) as stream,
            ):
                stream.until_done()
            with pytest.raises(anthropic.NotFoundError):
                client.messages.create(**{**self.FIELDS, "model": "claude"})

    def test_async(self, url: str):
        from anthropic import AsyncAnthropic

        async def main() -> str:
            async with AsyncAnthropic(base_url=url, api_key="secret", max_retries=0) as client:
                count = await client.messages.count_tokens(model="fake/alphabet", messages=[USER])  # type: ignore[list-item]
                assert count.input_tokens == len("[user]a|[assistant]<think>\n")
                async with client.messages.stream(**self.FIELDS) as stream:
                    return "".join([text async for text in stream.text_stream])

        assert asyncio.run(main()) == "so"
