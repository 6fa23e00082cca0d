"""Parameter x effect: what a value in a body makes of the engine's request, and of the answer by the fake's arithmetic."""

import json
import re
from typing import Any

import pytest

from xlane.engine import LogprobsMode, Request

from .conftest import Rig

MESSAGES = [{"role": "user", "content": "a"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/completions": {"prompt": "a", "max_tokens": 4},
    "/v1/responses": {"input": "a", "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
}


def sent(rig: Rig, path: str, body: dict[str, Any]) -> Request:
    rig.engine.submitted.clear()
    response = rig.post(path, **body)
    assert response.status_code == 200, response.text
    return rig.engine.submitted[0]


SAMPLING = [
    ("temperature", 0.5, "temperature", 0.5),
    ("temperature", 0, "temperature", 0.0),
    ("top_p", 0.5, "top_p", 0.5),
    ("top_k", 3, "top_k", 3),
    ("top_k", -1, "top_k", 0),
    ("min_p", 0.25, "min_p", 0.25),
    ("typical_p", 0.75, "typical_p", 0.75),
    ("repetition_penalty", 1.5, "repetition_penalty", 1.5),
    ("frequency_penalty", -1, "frequency_penalty", -1.0),
    ("presence_penalty", 2, "presence_penalty", 2.0),
    ("seed", 7, "seed", 7),
    ("seed", -1, "seed", 2**64 - 1),
    ("ignore_eos", True, "stop_ids", ()),
    ("stop_token_ids", [5], "stop_ids", (257, 258, 5)),
    ("min_tokens", 2, "min_tokens", 2),
    ("logit_bias", {"98": -100, "120": 2.5}, "logit_bias", ((98, -100.0), (120, 2.5))),
]


@pytest.mark.parametrize(("name", "value", "field", "expected"), SAMPLING)
@pytest.mark.parametrize("path", BODIES)
def test_sampling(rig: Rig, path: str, name: str, value: Any, field: str, expected: Any):
    neutral = sent(rig, path, BODIES[path])
    assert field == "seed" or expected in (0, 0.0) or getattr(neutral.sampling, field) != expected
    assert getattr(sent(rig, path, {**BODIES[path], name: value}).sampling, field) == expected


@pytest.mark.parametrize("path", BODIES)
def test_a_salt_keeps_a_prompt_apart(rig: Rig, path: str):
    assert sent(rig, path, BODIES[path]).cache_salt == ""
    assert sent(rig, path, {**BODIES[path], "cache_salt": "mine"}).cache_salt == "mine"
    refused = rig.post(path, **BODIES[path], cache_salt="x" * 513)
    assert refused.status_code == 400
    assert "cache_salt" in refused.text


NATIVE_PATHS = ("/generate", "/", "/invocations")


def with_terms(path: str, **terms: object) -> dict[str, Any]:
    return {"inputs": "a", "parameters": terms} if path in NATIVE_PATHS else {**BODIES[path], **terms}


@pytest.mark.parametrize("path", [*BODIES, *NATIVE_PATHS])
def test_priority_and_timeout(rig: Rig, path: str):
    plain = sent(rig, path, with_terms(path))
    assert (plain.priority, plain.deadline_s) == (0, None)
    asked = sent(rig, path, with_terms(path, priority=-3, timeout=2.5))
    assert (asked.priority, asked.deadline_s) == (-3, 2.5)
    for name, value in (("timeout", 0), ("timeout", -1.5), ("priority", 2**31), ("priority", -(2**31))):
        refused = rig.post(path, **with_terms(path, **{name: value}))
        assert refused.status_code == (422 if path in NATIVE_PATHS else 400)
        assert f"`{name}` must be" in refused.text


@pytest.mark.parametrize("path", [*BODIES, *NATIVE_PATHS])
def test_a_timeout_that_passes_is_504_and_not_to_be_asked_again(rig: Rig, path: str):
    rig.engine.first_delay_s = 0.05
    late = rig.post(path, **with_terms(path, timeout=0.01))
    assert late.status_code == 504
    assert "deadline of 0.01 s passed" in late.text
    assert "retry-after" not in late.headers
    assert late.headers.get("x-should-retry") == ("false" if path in BODIES else None)


def test_a_timeout_that_passes_ends_a_stream_with_an_error(rig: Rig):
    rig.engine.delay_s = 0.1
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = rig.post(path, **with_terms(path, timeout=0.05, stream=True))
        assert answer.status_code == 200
        assert '"code":"deadline_exceeded"' in answer.text
        assert "[DONE]" not in answer.text.partition("deadline_exceeded")[0]
    answer = rig.post("/generate_stream", inputs="a", parameters={"timeout": 0.05})
    assert answer.text.rstrip().endswith('"error_type":"deadline_exceeded"}')


NATIVE = [
    ("temperature", 0.5, "temperature", 0.5),
    ("top_p", 0.5, "top_p", 0.5),
    ("top_k", 3, "top_k", 3),
    ("typical_p", 0.75, "typical_p", 0.75),
    ("repetition_penalty", 1.5, "repetition_penalty", 1.5),
    ("frequency_penalty", -1, "frequency_penalty", -1.0),
    ("seed", 7, "seed", 7),
    ("do_sample", True, "temperature", 1.0),
    ("max_new_tokens", 9, "max_tokens", 9),
    ("watermark", True, "watermark", True),
    ("details", True, "logprobs", True),
    ("details", True, "logprobs_mode", LogprobsMode.PROCESSED),
    ("decoder_input_details", True, "logprobs", True),
]


@pytest.mark.parametrize(("name", "value", "field", "expected"), NATIVE)
def test_native(rig: Rig, name: str, value: Any, field: str, expected: Any):
    body = {"inputs": "a", "parameters": {name: value}}
    for path in ("/generate", "/", "/invocations"):
        assert getattr(sent(rig, path, body).sampling, field) == expected
    vertex = sent(rig, "/vertex", {"instances": [body]})
    assert getattr(vertex.sampling, field) == expected


def test_a_bias_changes_what_is_chosen(rig: Rig):
    # The fake's preferred token has a logit of 10, all others have 0.
    for path, text in (("/v1/completions", "text"), ("/v1/chat/completions", "message")):
        body = {**BODIES[path], "temperature": 0, "logit_bias": {str(ord("x")): 10.5}}
        answer = rig.post(path, **body).json()["choices"][0][text]
        assert (answer if isinstance(answer, str) else answer["content"]) == "xxxx"


def test_no_end_and_no_stop_string_before_the_least_length(rig: Rig):
    rig.engine.reply = "bc"
    assert rig.complete("a", max_tokens=9).json()["choices"][0]["text"] == "bc"
    answer = rig.complete("a", max_tokens=9, min_tokens=5).json()
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["finish_reason"] == "stop"
    rig.engine.reply = None
    for least, text in ((0, "bc"), (2, "bc"), (3, "bcdefghijklmno"), (4, "bcdefghijklmno")):
        answer = rig.complete("a", max_tokens=14, min_tokens=least, stop="d").json()
        assert answer["choices"][0]["text"] == text


def test_a_least_length_beyond_the_most_is_refused_where_the_most_is_the_context(rig: Rig):
    response = rig.complete("a", max_tokens=None, min_tokens=511)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "min_tokens")
    assert rig.complete("a", max_tokens=None, min_tokens=510).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_string_is_in_the_text_if_it_is_wanted(rig: Rig, stream: bool):
    for wanted, text in ((None, "bc"), (False, "bc"), (True, "bcde")):
        response = rig.complete(
            "a", max_tokens=9, stop="de", include_stop_str_in_output=wanted, stream=stream
        )
        if not stream:
            assert response.json()["choices"][0]["text"] == text
        else:
            assert "".join(re.findall('"text":"([a-z]*)"', response.text)) == text


EXTENSIONS = [
    ("use_beam_search", False, True), ("length_penalty", 1.0, 0.5), ("allowed_token_ids", [], [97]),
    ("bad_words", [], ["a"]), ("truncate_prompt_tokens", None, 5), ("skip_special_tokens", True, False),
    ("return_token_ids", False, True), ("return_tokens_as_token_ids", False, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "neutral", "wanted"), EXTENSIONS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_extensions_without_an_effect_are_refused_by_name(
    rig: Rig, path: str, name: str, neutral: Any, wanted: Any
):
    assert rig.post(path, **BODIES[path], **{name: neutral}).status_code == 200
    error = rig.post(path, **BODIES[path], **{name: wanted}).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


TOGETHER: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 1.5, "seed": 3}, {"top_p": 0.5, "seed": 1}, {"top_k": 5, "seed": 1}, {"min_p": 0.1, "seed": 2},
    {"repetition_penalty": 1.5, "temperature": 0}, {"frequency_penalty": 1.0, "temperature": 0}, {"presence_penalty": 1.0, "temperature": 0},
    {"stop": ["d"], "temperature": 0}, {"min_tokens": 3, "temperature": 0}, {"logit_bias": {"104": 100}, "temperature": 0},
    {"ignore_eos": True, "temperature": 0}, {"priority": -1, "temperature": 0}, {"timeout": 60, "temperature": 0},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}}}, "seed": 4},
]  # fmt: skip


@pytest.mark.parametrize("fields", TOGETHER, ids=lambda fields: next(iter(fields)))
@pytest.mark.parametrize("scored", [False, True])
def test_options_go_with_streams_and_several_choices(rig: Rig, fields: dict[str, Any], scored: bool):
    """The same text whole or streamed, with log-probabilities or without, and of one choice whether or not there are more."""
    rig.engine.obeys = True
    body = {
        **BODIES["/v1/chat/completions"],
        "max_tokens": 6,
        **fields,
        **({"logprobs": True, "top_logprobs": 2} if scored else {}),
    }
    texts: list[str] = []
    for count in (1, 3):
        whole = rig.post("/v1/chat/completions", **body, n=count)
        assert whole.status_code == 200, whole.text
        choices = sorted(whole.json()["choices"], key=lambda choice: choice["index"])
        said = [""] * count
        for event in events(rig.post("/v1/chat/completions", **body, n=count, stream=True)):
            for choice in event["choices"]:
                said[choice["index"]] += choice["delta"].get("content") or ""
        assert said == [choice["message"]["content"] for choice in choices]
        assert [choice["logprobs"] is not None for choice in choices] == [scored] * count
        texts.append(said[0])
    assert texts[0] == texts[1]
    assert texts[0]


def events(streamed: Any) -> list[dict[str, Any]]:
    assert streamed.status_code == 200
    return [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
