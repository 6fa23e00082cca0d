"""Log-probabilities in a response: those of its text, the same whole and streamed."""

from typing import Any

from .conftest import Rig
from .test_responses import ask, events, without_ids
from .test_tools import rig

__all__ = ["rig"]

SCORED: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def test_log_probabilities_of_the_text(rig: Rig):
    answer = ask(rig, **SCORED).json()
    chat = rig.chat(max_tokens=4, temperature=0, logprobs=True, top_logprobs=2).json()["choices"][0][
        "logprobs"
    ]["content"]
    [part] = answer["output"][0]["content"]
    assert part["logprobs"] == chat
    assert [len(token["top_logprobs"]) for token in part["logprobs"]] == [2] * 4
    assert answer["top_logprobs"] == 2
    told = events(rig, **SCORED)
    deltas = [event for event in told if event["type"] == "response.output_text.delta"]
    assert [token for event in deltas for token in event["logprobs"]] == chat
    assert [event["logprobs"] for event in told if event["type"] == "response.output_text.done"] == [chat]
    assert without_ids(told[-1]["response"]["output"]) == without_ids(answer["output"])
    rig.engine.reply = "é"
    tokens = ask(rig, **SCORED).json()["output"][0]["content"][0]["logprobs"]
    assert all(isinstance(token["bytes"], list) for token in tokens)


def test_log_probabilities_of_calls_and_thinking_are_not_told(rig: Rig):
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "See."}}\n</tool_call>'
    rig.engine.reply = f"See.\n{call}Done."
    fields = {"tools": [{"type": "function", "name": "f"}], "max_output_tokens": 200, **SCORED}
    answer = ask(rig, **fields)
    assert answer.status_code == 200, answer.text
    output = answer.json()["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message"]
    for item, text in ((output[0], "See."), (output[2], "Done.")):
        assert "".join(token["token"] for token in item["content"][0]["logprobs"]) == text
    ended = events(rig, **fields)[-1]["response"]["output"]
    without = [{**item, "call_id": ""} for item in without_ids(output)]
    assert [{**item, "call_id": ""} for item in without_ids(ended)] == without
