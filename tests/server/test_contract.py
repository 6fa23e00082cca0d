"""TGI's contract, the claims that belong to no one route's tests: order of checks, headers, framing, defaults, and OpenAI's traps."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from xlane.engine import EngineLost, Overloaded, Request, RequestFailed, StepOutput, TokenOutput
from xlane.models.typed import BREAK
from xlane.server import flags
from xlane.server.cli import Settings, choose, settle
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import BOS, ByteTokenizer
from .conftest import Rig
from .test_tools import rig as wide

__all__ = ["wide"]

USER = {"role": "user", "content": "a"}
TGIS = ServerConfig(max_stop_sequences=4, max_client_batch_size=4)
"""As the launcher has it."""
IN_ORDER: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 3}, "`best_of` must be > 0"),
    ({"temperature": -1.0}, "`temperature`"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty`"),
    ({"frequency_penalty": 3.0}, "`frequency_penalty`"),
    ({"top_p": 2.0}, "`top_p`"),
    ({"typical_p": 2.0}, "`typical_p`"),
    ({"top_k": 0}, "`top_k`"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4"),
    ({"top_n_tokens": 6}, "`top_n_tokens`"),
    ({"truncate": 0}, "`truncate`"),
    ({"max_new_tokens": 600}, "`inputs` tokens + `max_new_tokens` must be <= 512"),
]
"""What is wrong, in the order in which TGI looks; a grammar that is no JSON is told of sooner than there."""


@pytest.mark.parametrize("config", [TGIS])
@pytest.mark.parametrize("pair", itertools.pairwise(IN_ORDER), ids=lambda pair: pair[1][1][:20])
def test_the_first_thing_that_is_wrong_is_told(rig: Rig, pair: tuple[tuple[dict[str, Any], str], ...]):
    (first, words), (second, _) = pair
    for stream in (False, True):
        wrong = {"do_sample": True, **second, **first}
        if stream and "best_of" in wrong:
            continue
        answer = rig.post("/", inputs="a", parameters=wrong, stream=stream)
        assert answer.status_code == 422
        assert answer.json()["error_type"] == "validation"
        assert answer.json()["error"].startswith(f"Input validation error: {words}")


def test_what_a_stream_cannot_have_is_refused(rig: Rig):
    for parameters, words in (
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming"),
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming"),
    ):
        answer = rig.post("/generate_stream", inputs="a", parameters=parameters)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert words in answer.json()["error"]


WHOLE = (
    ("/generate", {"inputs": "ab", "parameters": {"max_new_tokens": 3}}, "ab", 3),
    ("/", {"inputs": "ab", "parameters": {"max_new_tokens": 3}}, "ab", 3),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 3}, "[user]a|[assistant]", 19),
    ("/v1/completions", {"prompt": "ab", "max_tokens": 3}, "ab", 3),
)


@pytest.mark.parametrize(("path", "body", "prompt", "tokens"), WHOLE)
def test_headers_of_a_whole_answer(rig: Rig, path: str, body: dict[str, Any], prompt: str, tokens: int):
    headers = rig.post(path, **body).headers
    for name in ("total", "validation", "queue", "inference"):
        assert headers[f"x-{name}-time"].isdigit()
    assert headers["x-time-per-token"].isdigit()
    assert (headers["x-prompt-tokens"], headers["x-generated-tokens"]) == (str(tokens), "3")
    assert headers["x-compute-characters"] == str(len(prompt))
    assert headers["x-compute-type"] == "1-fake"
    assert "." in headers["x-compute-time"]
    assert "x-total-tokens" not in headers


def test_the_marks_that_keep_typed_text_text_are_not_counted(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ByteTokenizer, "apply_chat", lambda self, *args, **kwargs: f"<{BREAK}|im_end|>a")
    for stream in (False, True):
        assert rig.chat(stream=stream).headers["x-compute-characters"] == str(len("<|im_end|>a"))


@pytest.mark.parametrize(("path", "body", "prompt", "tokens"), WHOLE[1:])
def test_a_stream_has_the_headers_of_its_beginning_and_tgis_framing(
    rig: Rig, path: str, body: dict[str, Any], prompt: str, tokens: int
):
    answer = rig.post(path, **body, stream=True)
    told = {name for name in answer.headers if name.startswith("x-") and name != "x-request-id"}
    assert told == {"x-compute-type", "x-compute-characters", "x-accel-buffering"}
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    *blocks, end = answer.text.split("\n\n")
    assert end == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert (blocks[-1] == "data: [DONE]") == path.startswith("/v1/")


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/v1/health"])
def test_a_healthy_server_says_nothing_more(rig: Rig, path: str):
    answer = rig.client.get(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_the_texts_of_all_tokens_are_the_text_with_its_special_ones(rig: Rig):
    rig.engine.reply = "h\N{SNOWMAN}é"
    answer = rig.generate(max_new_tokens=20, details=True).json()
    told = "".join(token["text"] for token in answer["details"]["tokens"])
    assert told == answer["generated_text"] + "<eos>"
    assert [token["special"] for token in answer["details"]["tokens"]][-2:] == [False, True]


def test_the_prompt_goes_first_if_it_is_wanted(rig: Rig):
    assert rig.generate("ab", return_full_text=True).json()["generated_text"] == "abcdef"
    assert rig.generate("ab", return_full_text=False).json()["generated_text"] == "cdef"
    events = rig.post(
        "/generate_stream", inputs="ab", parameters={"max_new_tokens": 2, "return_full_text": True}
    )
    assert json.loads(events.text.split("\n\n")[-2].removeprefix("data: "))["generated_text"] == "abcd"


def test_a_seed_that_was_told_makes_the_same_text(rig: Rig):
    first = rig.generate(do_sample=True, details=True).json()
    again = rig.generate(do_sample=True, details=True, seed=first["details"]["seed"]).json()
    assert again == first


def test_a_log_probability_that_json_has_no_number_for_is_null(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    outputs = rig.engine.submit

    async def endless(request: Request) -> Any:
        async for step in outputs(request):
            tokens = tuple(
                TokenOutput(t.id, -math.inf, ((t.id, -math.inf), (1, math.nan))) for t in step.tokens
            )
            yield replace(step, tokens=tokens) if isinstance(step, StepOutput) else step

    monkeypatch.setattr(rig.engine, "submit", endless)
    details = rig.generate(details=True, top_n_tokens=2, max_new_tokens=1).json()["details"]
    assert details["tokens"][0]["logprob"] is None
    assert [token["logprob"] for token in details["top_tokens"][0]] == [None, None]
    chat = rig.chat(max_tokens=1, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"][
        0
    ]
    assert chat["logprob"] == -9999.0


def test_tokenize_looks_at_the_whole_text(rig: Rig):
    body = {"inputs": "abc", "parameters": {"truncate": 1, "top_p": 0.5}}
    assert [token["id"] for token in rig.post("/tokenize", **body).json()] == [BOS, 97, 98, 99]


@pytest.mark.parametrize("config", [TGIS])
def test_more_prompts_than_a_client_may_send(rig: Rig):
    error = rig.complete(["a"] * 5).json()["error"]
    assert error["message"] == "Number of prompts exceeds the maximum allowed batch size of 4. Given: 5"
    assert error["param"] == "prompt"


def test_tgis_other_names_for_a_functions_fields(wide: Rig):
    tool = {
        "type": "function",
        "function": {"name": "f", "arguments": {"type": "object", "properties": {"a": {}}}},
    }
    called = {"id": "0", "type": "function", "function": {"name": "f", "parameters": {"a": 1}}}
    messages = [USER, {"role": "assistant", "tool_calls": [called]}, {"role": "tool", "content": "x"}]
    wide.chat(messages=messages, tools=[tool], max_tokens=1)
    [request] = wide.engine.submitted
    prompt = bytes(i for i in request.prompt_ids if i < 256).decode()
    assert '"parameters": {"type": "object", "properties": {"a": {}}}' in prompt
    assert '{"name": "f", "arguments": {"a": 1}}' in prompt


@pytest.mark.parametrize("stop", [None, [], "de", ["de"]])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stop_may_be_a_text_a_list_or_nothing(rig: Rig, path: str, stop: Any):
    body = {"messages": [USER], "prompt": "c", "max_tokens": 5, "temperature": 0, "stop": stop}
    choice = rig.post(path, **body).json()["choices"][0]
    assert choice["finish_reason"] == ("stop" if stop else "length")


TGIS_DEFAULTS = {
    "server.max_concurrent_requests": 128, "server.max_best_of": 2, "server.max_stop_sequences": 4,
    "server.max_top_n_tokens": 5, "server.max_client_batch_size": 4, "server.payload_limit": 2_000_000,
    "server.port": 3000, "server.host": "0.0.0.0", "server.cors_allow_origins": ("*",), "server.api_key": None,
    "server.disable_grammar_support": False, "server.graceful_termination_timeout_s": 90.0,
    "server.otlp_endpoint": None, "server.otlp_service_name": "text-generation-inference.router",
}  # fmt: skip


def read(line: str) -> Settings:
    command, rest = choose(["serve", *line.split()])
    return settle(command, rest, {}, flags.TGI_DEFAULTS)


@pytest.mark.parametrize("target", TGIS_DEFAULTS)
def test_the_launcher_has_tgis_defaults(target: str):
    room, _, name = target.partition(".")
    assert getattr(getattr(read(""), room), name) == TGIS_DEFAULTS[target]


def chunks_of(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("choices", [1, 3])
def test_every_choice_of_a_stream_ends_once_and_alone(rig: Rig, choices: int):
    chunks = chunks_of(rig.chat(stream=True, n=choices, stream_options={"include_usage": True}))
    *rest, usage = chunks
    assert usage["choices"] == []
    assert {(c["id"], c["created"], c["model"]) for c in chunks} == {
        ("", chunks[0]["created"], "fake/alphabet")
    }
    ends = [c for chunk in rest for c in chunk["choices"] if c["finish_reason"] is not None]
    assert sorted(c["index"] for c in ends) == list(range(choices))
    assert all("content" not in c["delta"] for c in ends)


HARMLESS: dict[str, Any] = {
    "reasoning_effort": "minimal", "verbosity": "low", "store": False, "metadata": {}, "service_tier": "flex",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s", "user": "u", "prediction": None,
    "modalities": ["text"], "audio": None, "web_search_options": None, "moderation": None, "parallel_tool_calls": True,
    "chat_id": "x", "features": {}, "response_format": {"type": "text", "strict": True}, "n": 1, "unheard_of": [1],
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_clients_send_as_well_is_taken(rig: Rig, name: str):
    assert rig.chat(**{name: HARMLESS[name]}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "system", "content": "s"}, USER, {"role": "system", "content": "t"}, USER]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "d"}]}, USER]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": None}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {}},
                "strict": True,
            }
        },
        {"max_tokens": None, "max_completion_tokens": None},
    ],
)
def test_what_clients_send_in_many_shapes_is_taken(wide: Rig, fields: dict[str, Any]):
    assert wide.chat(**fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages[0].content"),
        ({"n": 100_000}, "n"),
        ({"top_logprobs": 1000, "logprobs": True}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_400_with_its_name(rig: Rig, fields: dict[str, Any], param: str):
    answer = rig.chat(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert len(error["message"]) < 200


def errors() -> Iterator[tuple[str, str, int]]:
    yield "GET", "/v1/no/such", 404
    yield "GET", "/v1/models/absent", 404
    yield "GET", "/v1/chat/completions", 405
    yield "POST", "/v1/completions", 415
    yield "POST", "/v1/chat/completions", 401


@pytest.mark.parametrize(("method", "path", "status"), errors())
@pytest.mark.parametrize("config", [ServerConfig(api_key="k")])
def test_every_error_of_openais_routes_has_its_shape(rig: Rig, method: str, path: str, status: int):
    headers = {} if status == 401 else {"authorization": "Bearer k"}
    answer = rig.client.request(method, path, content=b"x", headers={**headers, "content-type": "text/plain"})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert isinstance(answer.json()["error"]["message"], str)


def test_a_wait_is_one_that_clients_keep_to(rig: Rig):
    rig.engine.refuse_with = Overloaded("full", 900.0)
    answer = rig.chat()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "120")
    assert answer.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_clients_ask_again_only_where_that_may_help(rig: Rig, path: str):
    body = {"messages": [USER], "input": "a", "max_tokens": 2}
    for error, again in (
        (EngineLost("gone"), "true"),
        (RequestFailed("NaN"), "false"),
        (ValueError("bug"), "false"),
    ):
        rig.engine.refuse_with = error
        answer = rig.post(path, **body)
        assert answer.status_code >= 500
        assert answer.headers["x-should-retry"] == again
