"""`functions` and `function_call`, OpenAI's tools before there were tools: the same road, told in the old words."""

from typing import Any

import pytest

from ..support.obedient import allows
from .conftest import Rig
from .test_tools import ARGUMENTS, CALL, NOW, PARAMETERS, TOOL, ask, events, prompt_of, rig

__all__ = ["rig"]

WEATHER = {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}
FUNCTIONS: dict[str, Any] = {"tools": None, "functions": [WEATHER, {"name": "now"}]}
CALLED = {"name": "weather", "arguments": ARGUMENTS}


def test_a_call_is_told_as_one_function(rig: Rig):
    [choice] = ask(rig, f"See.\n{CALL}", **FUNCTIONS).json()["choices"]
    assert choice["message"]["function_call"] == CALLED
    assert choice["message"]["content"] == "See."
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "function_call"
    grammar = rig.engine.submitted[-1].grammar
    assert allows(grammar, f"See.\n{CALL}")
    assert not allows(grammar, f"{CALL}\n{NOW}"), "there is no place for a second call"
    [choice] = ask(rig, "Rain.", **FUNCTIONS).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Rain.", "stop")


def test_a_stream_tells_it_in_pieces(rig: Rig):
    chunks = events(ask(rig, CALL, stream=True, **FUNCTIONS).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert calls[0] == {"name": "weather", "arguments": ""}
    assert all(set(call) == {"arguments"} for call in calls[1:])
    assert "".join(call["arguments"] for call in calls) == ARGUMENTS
    assert not any(delta.get("tool_calls") for delta in deltas)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["function_call"]


def test_a_function_that_is_named_is_called(rig: Rig):
    ask(rig, NOW, function_call={"name": "now"}, **FUNCTIONS)
    grammar = rig.engine.submitted[-1].grammar
    assert allows(grammar, NOW)
    assert not allows(grammar, CALL)
    assert not allows(grammar, "Rain.")
    ask(rig, CALL, function_call="none", **FUNCTIONS)
    assert rig.engine.submitted[-1].grammar is None
    assert prompt_of(rig) == "[user]a|[assistant]"


def test_calls_and_results_of_before_are_told_to_the_model(rig: Rig):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "function_call": CALLED},
        {"role": "function", "name": "weather", "content": "rain"},
    ]
    ask(rig, "ok", messages=messages, **FUNCTIONS)
    assert prompt_of(rig).partition("[user]a|")[2] == (
        f"[assistant]{CALL}|[user]<tool_response>\nrain\n</tool_response>|[assistant]"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": {"name": "f"}}, "functions"),
        ({"functions": "f"}, "functions"),
        ({"functions": [3]}, "functions[0]"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name"),
        ({"functions": [WEATHER, WEATHER]}, "functions"),
        ({"functions": [WEATHER], "function_call": "weather"}, "function_call"),
        ({"functions": [WEATHER], "function_call": {"name": "absent"}}, "function_call"),
        ({"functions": [WEATHER], "function_call": {}}, "function_call.name"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"functions": [WEATHER], "tools": [TOOL]}, "functions"),
        ({"functions": [{"name": "f", "parameters": {"not": {}}}], "function_call": {"name": "f"}}, "functions"),
        ({"messages": [{"role": "assistant", "function_call": {"arguments": "{}"}}]}, "messages[0].tool_calls[0].function"),
    ],
)  # fmt: skip
def test_refusals(rig: Rig, fields: dict[str, Any], param: str):
    answer = rig.chat(**fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
