"""Clients that ask for answers of a form and parse them: OpenAI's `.parse()`, instructor, LangChain. Against the demo model,
which is too small to be right; the form must be."""

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from ..support.whole_server import Served

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Mood(BaseModel):
    """How somebody feels."""

    mood: Literal["good", "bad"]
    strength: int = Field(ge=0, le=9)


MESSAGES: Any = [{"role": "user", "content": "I won the race! How do I feel? Mood and strength."}]
LIMITS: Any = {"max_tokens": 60, "temperature": 0}


@pytest.fixture
def client(demo: Served) -> Any:
    from openai import OpenAI

    with OpenAI(base_url=f"{demo.url}/v1/", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def served(client: Any) -> str:
    return next(iter(client.models.list())).id


def test_parse(client: Any, served: str):
    answer = client.chat.completions.parse(model=served, messages=MESSAGES, response_format=Mood, **LIMITS)
    assert isinstance(answer.choices[0].message.parsed, Mood)
    assert answer.choices[0].finish_reason == "stop"


def test_parse_a_stream(client: Any, served: str):
    with client.chat.completions.stream(
        model=served, messages=MESSAGES, response_format=Mood, **LIMITS
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion().choices[0].message
    assert "".join(pieces) == whole.content
    assert isinstance(whole.parsed, Mood)


def test_parse_of_a_response(client: Any, served: str):
    answer = client.responses.parse(
        model=served, input=MESSAGES[0]["content"], text_format=Mood, max_output_tokens=60, temperature=0
    )
    assert isinstance(answer.output_parsed, Mood)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(client: Any, served: str, mode: str):
    import instructor

    asking = instructor.from_openai(client, mode=instructor.Mode[mode])
    mood = asking.chat.completions.create(
        model=served, messages=MESSAGES, response_model=Mood, max_retries=0, **LIMITS
    )
    assert isinstance(mood, Mood)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain(demo: Served, served: str, method: str):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=served, base_url=f"{demo.url}/v1", api_key="none", max_retries=0, **LIMITS)
    mood = chat.with_structured_output(Mood, method=method).invoke(MESSAGES[0]["content"])
    assert isinstance(mood, Mood)


def test_a_tool_that_must_be_called_is_called(client: Any, served: str):
    tool = {"type": "function", "function": {"name": "tell_mood", "parameters": Mood.model_json_schema()}}
    answer = client.chat.completions.create(
        model=served,
        messages=MESSAGES,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        **LIMITS,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "tell_mood"
    Mood.model_validate_json(call.function.arguments)
