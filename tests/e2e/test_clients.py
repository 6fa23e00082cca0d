"""The clients people use, unchanged, against whatever `server_url` is: nothing here depends on what the model says."""

import asyncio
import functools
import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.clients

MESSAGES: Any = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Say hello."},
]
PROMPT = "The alphabet begins with a"
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"name": "weather", "description": "Tells the weather.", "parameters": WEATHER}
CHAT_TOOL: dict[str, Any] = {"type": "function", "function": TOOL}


@functools.cache
def weather_model() -> Any:
    """The arguments of the tool, as pydantic's."""
    from typing import Literal

    from pydantic import BaseModel, Field

    class Weather(BaseModel):
        city: Literal["Oslo", "Rome"]
        days: int = Field(ge=1, le=7)

    return Weather


def check_weather(arguments: dict[str, Any]) -> bool:
    return arguments["city"] in ("Oslo", "Rome") and 1 <= arguments["days"] <= 7 and len(arguments) == 2


class TestOpenAI:
    @pytest.fixture
    def client(self, server_url: str) -> Any:
        from openai import OpenAI

        with OpenAI(base_url=f"{server_url}/v1/", api_key="none", max_retries=0, timeout=60) as client:
            yield client

    def test_models(self, client: Any, model: str):
        assert [m.id for m in client.models.list()] == [model]
        assert client.models.retrieve(model).id == model

    def test_chat(self, client: Any, model: str):
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_completion_tokens=8, temperature=0
        )
        choice = answer.choices[0]
        assert choice.message.content
        assert choice.message.role == "assistant"
        assert choice.finish_reason in ("stop", "length")
        assert answer.usage.completion_tokens <= 8
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens >= 0

    def test_a_stream_says_what_the_answer_says(self, client: Any, model: str):
        fields = {"model": model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**fields)
        pieces = list(
            client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        )
        text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        assert text == whole.choices[0].message.content
        assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.choices[0].finish_reason
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens

    def test_logprobs_and_choices(self, client: Any, model: str):
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=4, n=2, seed=1, logprobs=True, top_logprobs=3
        )
        assert [c.index for c in answer.choices] == [0, 1]
        for entry in answer.choices[0].logprobs.content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 3

    def test_a_seed_repeats_an_answer(self, client: Any, model: str):
        texts = {
            client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, seed=7)
            .choices[0]
            .message.content
            for _ in range(2)
        }
        assert len(texts) == 1

    def test_completions(self, client: Any, model: str):
        answer = client.completions.create(
            model=model, prompt=[PROMPT, "b"], max_tokens=4, temperature=0, logprobs=2
        )
        assert [c.index for c in answer.choices] == [0, 1]
        assert len(answer.choices[0].logprobs.tokens) <= 4
        stream = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=4, temperature=0, stream=True
        )
        assert "".join(p.choices[0].text for p in stream) == answer.choices[0].text

    def test_the_streaming_helper(self, client: Any, model: str):
        fields: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 200, "temperature": 0}
        form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
        for choices in (1, 3):
            with client.chat.completions.stream(**fields, response_format=form, n=choices) as stream:
                kinds = [event.type for event in stream]
                final = stream.get_final_completion()
            assert "chunk" in kinds
            assert [choice.message.role for choice in final.choices] == ["assistant"] * choices
        # What was answered can be sent back.
        messages = [*MESSAGES, final.choices[0].message, MESSAGES[-1]]
        assert client.chat.completions.create(model=model, messages=messages, max_tokens=4).choices

    def test_errors_are_the_clients_own(self, client: Any, model: str):
        import openai

        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="no-such-model", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        assert missing.value.request_id
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=model, messages=MESSAGES, temperature=5, stream=True)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model=model, prompt=PROMPT, max_tokens=10**7)
        assert long.value.code == "context_length_exceeded"

    def test_async(self, server_url: str, model: str):
        from openai import AsyncOpenAI

        async def ask() -> list[str]:
            async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
                fields: Any = {"model": model, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
                whole = [client.chat.completions.create(**fields) for _ in range(4)]
                texts = [answer.choices[0].message.content or "" for answer in await asyncio.gather(*whole)]
                pieces = await client.chat.completions.create(**fields, stream=True)
                texts.append("".join([p.choices[0].delta.content or "" async for p in pieces]))
                return texts

        texts = asyncio.run(ask())
        assert len(texts) == 5
        assert len(set(texts)) == 1

    def test_parse_gives_what_was_asked_for(self, client: Any, model: str):
        weather = weather_model()
        answer = client.chat.completions.parse(
            model=model, messages=MESSAGES, response_format=weather, max_tokens=200, temperature=0
        )
        parsed = answer.choices[0].message.parsed
        assert isinstance(parsed, weather)
        assert answer.choices[0].finish_reason == "stop"
        with client.chat.completions.stream(
            model=model, messages=MESSAGES, response_format=weather, max_tokens=200, temperature=0
        ) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == parsed

    def test_tools(self, client: Any, model: str):
        import openai

        tool = openai.pydantic_function_tool(weather_model(), name="weather")
        fields: dict[str, Any] = {"model": model, "max_tokens": 200, "temperature": 0, "tools": [tool]}
        # A small model would go on calling.
        once = {"tool_choice": "required", "parallel_tool_calls": False}
        answer = client.chat.completions.parse(**fields, messages=MESSAGES, **once)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        call = choice.message.tool_calls[0]
        assert isinstance(call.function.parsed_arguments, weather_model())
        result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
        more = client.chat.completions.create(**fields, messages=[*MESSAGES, choice.message, result])
        assert more.choices[0].finish_reason in ("stop", "length", "tool_calls")

    def test_tools_streamed(self, client: Any, model: str):
        fields: dict[str, Any] = {"model": model, "max_tokens": 200, "temperature": 0, "messages": MESSAGES}
        choice = {"type": "function", "function": {"name": "weather"}}
        with client.chat.completions.stream(**fields, tools=[CHAT_TOOL], tool_choice=choice) as stream:
            events = list(stream)
            final = stream.get_final_completion()
        [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        assert check_weather(json.loads(done.arguments))
        [call] = final.choices[0].message.tool_calls
        assert call.function.arguments == done.arguments
        assert final.choices[0].message.role == "assistant"
        assert final.choices[0].finish_reason == "tool_calls"

    def test_what_cannot_be_a_schema_is_the_clients_own_error(self, client: Any, model: str):
        import openai

        schema = {"type": "array", "uniqueItems": True}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
            client.chat.completions.create(model=model, messages=MESSAGES, response_format=form)
        assert refused.value.param == "response_format.json_schema.schema"


class TestOpenAIResponses:
    @pytest.fixture
    def client(self, server_url: str) -> Any:
        from openai import OpenAI

        with OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client

    @pytest.fixture
    def fields(self, model: str) -> dict[str, Any]:
        return {"model": model, "input": "Say hello.", "instructions": "Be brief.", "max_output_tokens": 8}

    def test_create(self, client: Any, fields: dict[str, Any]):
        answer = client.responses.create(**fields, temperature=0, store=True, metadata={"a": "b"})
        assert answer.output_text
        assert answer.status in ("completed", "incomplete")
        assert answer.usage.output_tokens <= 8
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
        assert answer.usage.input_tokens_details.cached_tokens >= 0
        items = [
            {"role": "user", "content": "Say hello."},
            *answer.output,
            {"role": "user", "content": "Again."},
        ]
        assert client.responses.create(**{**fields, "input": items}).output_text

    def test_a_stream_says_what_the_answer_says(self, client: Any, fields: dict[str, Any]):
        whole = client.responses.create(**fields, temperature=0)
        events = list(client.responses.create(**fields, temperature=0, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
        assert events[-1].type == f"response.{whole.status}"
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == whole.output_text == events[-1].response.output_text

    def test_the_streaming_helper(self, client: Any, fields: dict[str, Any]):
        with client.responses.stream(**fields) as stream:
            kinds = [event.type for event in stream]
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 1

    def test_errors_are_the_clients_own(self, client: Any, fields: dict[str, Any]):
        import openai

        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**fields, previous_response_id="resp_1", stream=True)
        assert refused.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            client.responses.create(**{**fields, "model": "no-such-model"})

    def test_async(self, server_url: str, fields: dict[str, Any]):
        from openai import AsyncOpenAI

        async def ask() -> set[str]:
            async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
                whole = [client.responses.create(**fields, temperature=0) for _ in range(3)]
                return {answer.output_text for answer in await asyncio.gather(*whole)}

        assert len(asyncio.run(ask())) == 1

    def test_parse_gives_what_was_asked_for(self, client: Any, model: str):
        weather = weather_model()
        fields = {"model": model, "input": "Will it rain?", "max_output_tokens": 200, "temperature": 0}
        answer = client.responses.parse(**fields, text_format=weather)
        assert isinstance(answer.output_parsed, weather)
        with client.responses.stream(**fields, text_format=weather) as stream:
            assert stream.get_final_response().output_parsed == answer.output_parsed

    def test_tools(self, client: Any, model: str):
        fields: dict[str, Any] = {
            "model": model, "max_output_tokens": 200, "temperature": 0, "tools": [{"type": "function", **TOOL}],
        }  # fmt: skip
        items: list[Any] = [{"role": "user", "content": "Will it rain?"}]
        once = {"tool_choice": "required", "parallel_tool_calls": False}
        answer = client.responses.create(**fields, input=items, **once)
        [call, *_] = answer.output
        assert call.type == "function_call"
        assert check_weather(json.loads(call.arguments))
        items += [
            *answer.output,
            {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."},
        ]
        assert client.responses.create(**fields, input=items).output
        with client.responses.stream(**fields, input="Will it rain?", **once) as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output[0].arguments == call.arguments
        assert "response.function_call_arguments.done" in kinds


class TestAnthropic:
    @pytest.fixture
    def client(self, server_url: str) -> Any:
        from anthropic import Anthropic

        with Anthropic(base_url=server_url, api_key="none", max_retries=0, timeout=60) as client:
            yield client

    @pytest.fixture
    def fields(self, model: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
        greedy = {"temperature": 0}  # newer clients have no argument for it
        return {
            "model": model,
            "system": "Be brief.",
            "messages": messages,
            "max_tokens": 8,
            "extra_body": greedy,
        }

    def test_create(self, client: Any, fields: dict[str, Any]):
        answer = client.messages.create(**fields)
        assert answer.content[-1].text
        assert answer.stop_reason in ("end_turn", "max_tokens")
        assert 0 < answer.usage.output_tokens <= 8
        asked = {name: fields[name] for name in ("model", "system", "messages")}
        count = client.messages.count_tokens(**asked).input_tokens
        assert count == answer.usage.input_tokens + answer.usage.cache_read_input_tokens

    def test_a_stream_says_what_the_answer_says(self, client: Any, fields: dict[str, Any]):
        whole = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == whole.content[-1].text == final.content[-1].text
        assert (final.stop_reason, final.usage.output_tokens) == (
            whole.stop_reason,
            whole.usage.output_tokens,
        )
        kinds = [event.type for event in client.messages.create(**fields, stream=True)]
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])

    def test_a_stop_sequence_is_told(self, client: Any, fields: dict[str, Any]):
        text = client.messages.create(**fields).content[-1].text
        stop = text[len(text) // 2 :]
        answer = client.messages.create(**fields, stop_sequences=[stop])
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)

    def test_errors_are_the_clients_own(self, client: Any, fields: dict[str, Any]):
        import anthropic

        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(**{**fields, "model": "no-such-model"})
        assert missing.value.request_id
        with pytest.raises(anthropic.BadRequestError, match="web_search"):
            client.messages.create(**fields, tools=[{"type": "web_search_20250305", "name": "web_search"}])

    def test_async(self, server_url: str, fields: dict[str, Any]):
        from anthropic import AsyncAnthropic

        async def ask() -> set[str]:
            async with AsyncAnthropic(base_url=server_url, api_key="none", max_retries=0) as client:
                whole = [client.messages.create(**fields) for _ in range(3)]
                texts = {answer.content[-1].text for answer in await asyncio.gather(*whole)}
                async with client.messages.stream(**fields) as stream:
                    return texts | {await stream.get_final_text()}

        assert len(asyncio.run(ask())) == 1

    def test_tools(self, client: Any, fields: dict[str, Any]):
        tool = {"name": "weather", "description": "Tells the weather.", "input_schema": WEATHER}
        fields = {**fields, "tools": [tool], "max_tokens": 200}
        once = {"type": "any", "disable_parallel_tool_use": True}
        answer = client.messages.create(**fields, tool_choice=once)
        assert answer.stop_reason == "tool_use"
        [call, *_] = answer.content
        assert (call.type, call.name) == ("tool_use", "weather")
        assert check_weather(call.input)
        with client.messages.stream(**fields, tool_choice={"type": "tool", "name": "weather"}) as stream:
            assert stream.get_final_message().content[0].input == call.input
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}
        turns = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(**{**fields, "messages": [*fields["messages"], *turns]}).content

    def test_a_form_is_kept(self, client: Any, fields: dict[str, Any]):
        form = {"format": {"type": "json_schema", "schema": WEATHER}}
        answer = client.messages.create(**{**fields, "max_tokens": 200}, output_config=form)
        assert check_weather(json.loads(answer.content[-1].text))


def test_both_apis_give_the_same_greedy_text(server_url: str):
    """Two roads to one engine: a prompt's greedy continuation does not depend on the API."""
    native = httpx.post(
        f"{server_url}/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 6}}, timeout=60
    )
    openai = httpx.post(
        f"{server_url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 6, "temperature": 0}, timeout=60
    )
    assert native.json()["generated_text"] == openai.json()["choices"][0]["text"]


def test_tokenize_gives_back_the_text(server_url: str):
    text = "naïve café 🙂"
    tokens = httpx.post(f"{server_url}/tokenize", json={"inputs": text}).json()
    covered = {i for token in tokens for i in range(token["start"], token["stop"])}
    assert covered == set(range(len(text.encode())))


def test_metrics_count_what_was_asked(server_url: str):
    def count() -> float:
        lines = httpx.get(f"{server_url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith("tgi_request_success "))

    before = count()
    httpx.post(
        f"{server_url}/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 1}}, timeout=60
    )
    assert count() == before + 1
