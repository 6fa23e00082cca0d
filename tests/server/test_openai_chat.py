"""/v1/chat/completions against the engine that says the alphabet."""

import json
from typing import Any

import pytest

from xlane.engine import LogprobsMode, Overloaded, RequestFailed

from ..support.byte_tokenizer import END_OF_TURN, EOS
from .conftest import Rig

USER = {"role": "user", "content": "a"}


def chunks(rig: Rig, content: str = "a", **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream without its [DONE], which is checked."""
    response = rig.chat(content, stream=True, **{"temperature": 0, **fields})
    assert response.status_code == 200, response.text
    *lines, done, nothing = response.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def said(pieces: list[dict[str, Any]], choice: int = 0) -> str:
    choices = [c for piece in pieces for c in piece["choices"] if c["index"] == choice]
    return "".join(c["delta"].get("content") or "" for c in choices)


def prompt_of(rig: Rig) -> str:
    return bytes(rig.engine.submitted[-1].prompt_ids).decode()


def test_answer(rig: Rig):
    rig.engine.cached_tokens = 5
    answer = rig.chat(temperature=0).json()
    assert answer["object"] == "chat.completion"
    assert (answer["id"], answer["model"]) == ("", "fake/alphabet")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abcd", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    prompt = len("[user]a|[assistant]")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 4,
        "total_tokens": prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 5},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_the_prompt_is_the_template_without_more_special_tokens(rig: Rig):
    rig.chat("a")
    assert prompt_of(rig) == "[user]a|[assistant]"


def test_messages_of_every_kind(rig: Rig):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "c"},
    ]
    assert rig.post("/v1/chat/completions", messages=messages, max_tokens=1).status_code == 200
    assert prompt_of(rig) == (
        "[system]d|[system]s|[user]12|"
        '[assistant]<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>|'
        "[user]<tool_response>\nr\n</tool_response>|[assistant]"
    )


def test_a_last_message_of_the_assistant_is_continued(rig: Rig):
    messages = [USER, {"role": "assistant", "content": "wxy"}]
    answer = rig.post("/v1/chat/completions", messages=messages, max_tokens=2, temperature=0).json()
    assert prompt_of(rig) == "[user]a|[assistant]wxy"
    assert answer["choices"][0]["message"]["content"] == "za"


def test_what_to_go_on_with_can_be_said(rig: Rig):
    said = {"role": "assistant", "content": "wxy"}
    for fields, prompt in (
        ({"add_generation_prompt": True}, "[user]a|[assistant]wxy|[assistant]"),
        ({"continue_final_message": False}, "[user]a|[assistant]wxy|[assistant]"),
        ({"continue_final_message": True}, "[user]a|[assistant]wxy"),
        ({"continue_final_message": False, "add_generation_prompt": False}, "[user]a|[assistant]wxy|"),
    ):
        rig.post("/v1/chat/completions", messages=[USER, said], max_tokens=1, **fields)
        assert prompt_of(rig) == prompt


def test_a_refusal_is_a_text_too(rig: Rig):
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    rig.post("/v1/chat/completions", messages=[USER, said, USER], max_tokens=1)
    assert prompt_of(rig) == "[user]a|[assistant]no|[user]a|[assistant]"


def test_template_arguments(rig: Rig):
    rig.chat("a", chat_template_kwargs={"thinking": False}, reasoning_effort="low")
    assert prompt_of(rig).startswith("{reasoning_effort=low}{thinking=False}[user]")
    rig.chat("a", chat_template_kwargs={"documents": [{"text": "t"}]})
    assert prompt_of(rig).startswith("{documents=[{'text': 't'}]}[user]")
    problem = rig.chat("a", chat_template_kwargs={"thinking": True, "mood": 1}).json()["error"]
    assert problem["message"] == (
        "`chat_template_kwargs.mood` is no variable of this model's chat template; it reads documents, enable_thinking, thinking"
    )
    refused = rig.post("/chat_tokenize", messages=[USER], chat_template_kwargs={"mood": 1})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")


def test_stream(rig: Rig):
    first, *_, last = pieces = chunks(rig)
    assert said(pieces) == "abcd"
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "a", "tool_calls": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert last["choices"][0]["finish_reason"] == "length"
    assert "content" not in last["choices"][0]["delta"]
    assert all(c["delta"]["role"] == "assistant" for piece in pieces for c in piece["choices"])
    assert {(p["id"], p["created"], p["model"], p["object"]) for p in pieces} == {
        ("", first["created"], "fake/alphabet", "chat.completion.chunk")
    }
    assert all(piece["usage"] is None for piece in pieces)


def test_openais_own_clients_are_told_the_role_once(rig: Rig):
    body = {"messages": [USER], "max_tokens": 2, "n": 2, "stream": True}
    told = rig.client.post("/v1/chat/completions", json=body, headers={"x-stainless-lang": "python"}).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in told.split("\n\n")[:-2]]
    deltas = [[c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == i] for i in (0, 1)]
    for first, *others in deltas:
        assert first == {"role": "assistant"}
        assert others
        assert not any("role" in delta for delta in others)


def test_stream_with_usage(rig: Rig):
    *rest, last = chunks(rig, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert all(piece["usage"] is None for piece in rest)


def test_no_empty_text_in_a_stream_but_for_an_empty_answer(rig: Rig):
    rig.engine.reply = "é"
    contents = [c["delta"].get("content") for p in chunks(rig) for c in p["choices"]]
    assert contents == ["é", None]
    rig.engine.reply = ""
    contents = [c["delta"].get("content") for p in chunks(rig) for c in p["choices"]]
    assert contents == ["", None]


@pytest.mark.parametrize("stop", ["de", ["zz", "de"]])
def test_a_stop_string_is_cut_off(rig: Rig, stop: Any):
    choice = rig.chat(temperature=0, max_tokens=20, stop=stop).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "stop")
    pieces = chunks(rig, max_tokens=20, stop=stop)
    assert said(pieces) == "abc"
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(rig.engine.cancelled) == 2


def test_end_of_sequence_is_stop(rig: Rig):
    rig.engine.reply = "hi"
    choice = rig.chat(max_tokens=20).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hi", "stop")


def test_several_choices(rig: Rig):
    answer = rig.chat(n=3, seed=0, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][0]["message"]["content"] == "ab"
    assert len({request.sampling.seed for request in rig.engine.submitted}) == 3
    assert answer["usage"]["completion_tokens"] == 6
    pieces = chunks(rig, n=3, seed=0, temperature=1, max_tokens=2, stream_options={"include_usage": True})
    assert [said(pieces, i) for i in range(3)] == [c["message"]["content"] for c in answer["choices"]]
    assert sum(c["finish_reason"] is not None for p in pieces for c in p["choices"]) == 3
    assert pieces[-1]["usage"] == answer["usage"]


def test_logprobs(rig: Rig):
    fields: dict[str, Any] = {
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0,
        "max_tokens": 20,
        "stop": "de",
    }
    content = rig.chat(**fields).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "b", "c"]
    assert content[0] == {
        "token": "a",
        "logprob": -0.125,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.125, "bytes": [97]},
            {"token": "b", "logprob": -1.125, "bytes": [98]},
        ],
    }
    streamed = [
        entry
        for piece in chunks(rig, **fields)
        for choice in piece["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    assert rig.engine.submitted[0].sampling.logprobs_mode is LogprobsMode.RAW


def test_logprobs_of_half_characters_come_with_the_whole_one(rig: Rig):
    rig.engine.reply = "é"
    (first, _last) = chunks(rig, logprobs=True)
    content = first["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [
        ("\N{REPLACEMENT CHARACTER}", None),
        ("é", list("é".encode())),
    ]


def test_max_completion_tokens_wins(rig: Rig):
    rig.chat(max_tokens=3, max_completion_tokens=2)
    rig.chat(max_tokens=None)
    assert [r.sampling.max_tokens for r in rig.engine.submitted] == [2, 512 - 19]


def test_parameters_reach_the_engine(rig: Rig):
    rig.chat(
        temperature=0.5, top_p=0.5, top_k=3, min_p=0.25, typical_p=0.75, seed=-1, stop_token_ids=[5],
        frequency_penalty=-1, presence_penalty=2, repetition_penalty=1.5, ignore_eos=True,
    )  # fmt: skip
    sampling = rig.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.5, 3)
    assert (sampling.min_p, sampling.typical_p) == (0.25, 0.75)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (-1, 2)
    assert sampling.repetition_penalty == 1.5
    assert (sampling.seed, sampling.stop_ids) == (2**64 - 1, (5,))
    rig.chat(top_p=0)
    sampling = rig.engine.submitted[1].sampling
    assert (sampling.temperature, sampling.stop_ids) == (0.0, (EOS, END_OF_TURN))


def test_nulls_are_absent_and_harmless_fields_are_ignored(rig: Rig):
    nulls = (
        "model max_completion_tokens temperature top_p n seed stop stream stream_options logprobs top_logprobs "
        "tools tool_choice response_format logit_bias functions presence_penalty frequency_penalty"
    )
    harmless = {
        "user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k",
        "safety_identifier": "s", "parallel_tool_calls": False, "chat_id": 1, "response_format": {"type": "text"},
        "tools": [], "tool_choice": "none", "logit_bias": {},
    }  # fmt: skip
    assert rig.chat(**dict.fromkeys(nulls.split())).status_code == 200
    assert rig.chat(**harmless).status_code == 200


@pytest.mark.parametrize("model", ["tgi", "dummy", "", "fake/alphabet", None])
def test_names_of_the_served_model(rig: Rig, model: str | None):
    assert rig.chat(model=model).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"top_p": 1.1}, 400, "top_p"),
        ({"min_p": -0.1}, 400, "min_p"),
        ({"top_k": -2}, 400, "top_k"),
        ({"presence_penalty": 3}, 400, "presence_penalty"),
        ({"frequency_penalty": -3}, 400, "frequency_penalty"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"n": 0}, 400, "n"),
        ({"n": 1_000_000_000}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_completion_tokens": -1}, 400, "max_completion_tokens"),
        ({"max_tokens": 10_000}, 400, "max_tokens"),
        ({"max_tokens": 2**63}, 400, "max_tokens"),
        ({"seed": 2**64}, 400, "seed"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"stop": ["z"] * 65}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"stream": "true"}, 400, "stream"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"logit_bias": {"259": 5}}, 400, "logit_bias"),
        ({"logit_bias": {"-1": 5}}, 400, "logit_bias"),
        ({"logit_bias": {"a": 5}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, 400, "logit_bias"),
        ({"logit_bias": {"1": -101}}, 400, "logit_bias"),
        ({"logit_bias": {"1": "5"}}, 400, "logit_bias"),
        ({"logit_bias": [1.0]}, 400, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias"),
        ({"min_tokens": -1}, 400, "min_tokens"),
        ({"min_tokens": 5}, 400, "min_tokens"),
        ({"chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, 400, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"unread": 1}}, 400, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, 400, "continue_final_message"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "foo", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "system", "content": "refuse me"}, USER]}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(rig: Rig, fields: dict[str, Any], status: int, param: str, stream: bool):
    if "stream" in fields or "stream_options" in fields:
        stream = False
    response = rig.chat(**{"stream": stream, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert rig.engine.submitted == []


def test_too_long_is_said_in_the_words_clients_look_for(rig: Rig):
    for content in ("a" * 450, "a" * 400_000):
        error = rig.chat(content).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 512 tokens. However, you")


def test_a_failure_after_the_first_token_is_the_last_event_before_done(rig: Rig):
    rig.engine.fail_with = RequestFailed("NaN")
    pieces = chunks(rig, max_tokens=9)
    assert pieces[-1]["error"]["code"] == "generation_failed"
    assert said(pieces[:-1]) == "abc"


@pytest.mark.parametrize("stream", [False, True])
def test_overload(rig: Rig, stream: bool):
    rig.engine.refuse_with = Overloaded("the queue is full", 500.0)
    response = rig.chat(stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (429, "120")
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_one_failing_choice_ends_all(rig: Rig):
    rig.engine.fail_with = RequestFailed("NaN")
    assert rig.chat(n=3, max_tokens=9).status_code == 500
    assert rig.engine.active == 0
    assert len(rig.engine.cancelled) == 3
