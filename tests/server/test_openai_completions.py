"""/v1/completions and the model lists, against the engine that says the alphabet."""

import json
from typing import Any

import pytest

from ..support.byte_tokenizer import BOS
from .conftest import Rig


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def test_answer(rig: Rig):
    answer = rig.complete("a").json()
    assert (answer["object"], answer["id"], answer["model"]) == ("text_completion", "", "fake/alphabet")
    assert answer["choices"] == [{"index": 0, "text": "bcde", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["total_tokens"] == 2 + 4


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["bc"]),
        (["a", "k"], ["bc", "lm"]),
        ([97, 107], ["lm"]),
        ([[97], [107], [98]], ["bc", "lm", "cd"]),
    ],
)
def test_prompts_of_every_kind(rig: Rig, prompt: Any, expected: list[str]):
    assert texts(rig.complete(prompt, max_tokens=2).json()) == expected


def test_as_many_prompts_and_stops_as_clients_send_at_a_time(rig: Rig):
    """LangChain sends 20 prompts in a body, Continue no fewer than five stop strings."""
    answer = rig.complete([chr(ord("a") + i) for i in range(20)], max_tokens=1, stop=list("VWXYZ"))
    assert len(texts(answer.json())) == 20


def test_ids_are_taken_as_they_are_and_texts_begin_a_sequence(rig: Rig):
    rig.complete([97])
    rig.complete("a")
    assert [request.prompt_ids for request in rig.engine.submitted] == [(97,), (BOS, 97)]


@pytest.mark.parametrize(("asked", "ids"), [(None, [BOS, 97]), (True, [BOS, 97]), (False, [97])])
def test_special_tokens_are_added_unless_they_are_in_the_text(rig: Rig, asked: bool | None, ids: list[int]):
    assert rig.complete("a", add_special_tokens=asked).status_code == 200
    assert list(rig.engine.submitted[-1].prompt_ids) == ids
    assert rig.complete("", add_special_tokens=False).status_code == 400


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"), ([], "prompt"), ([[]], "prompt"), ([""], "prompt"), (["a", 1], "prompt"),
        ([-1], "prompt"), ([259], "prompt"), ([2**31], "prompt"), ([[97], "a"], "prompt"), (["a"] * 65, "prompt"),
        ([0.5], "prompt[0]"), (None, "prompt"),
    ],
)  # fmt: skip
def test_prompts_that_are_refused(rig: Rig, prompt: Any, param: str):
    response = rig.complete(prompt)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].startswith(param.partition("[")[0])
    assert rig.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 17}, "best_of"),
    ],
)
def test_refusals(rig: Rig, fields: dict[str, Any], param: str):
    response = rig.complete("a", **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_neutral_values_of_what_is_refused(rig: Rig):
    assert rig.complete("a", suffix="", echo=False, best_of=1, logprobs=None).status_code == 200


def test_choices_of_several_prompts_are_in_order(rig: Rig):
    answer = rig.complete(["a", "k"], n=2, max_tokens=2, temperature=1, seed=0).json()
    assert len(texts(answer)) == 4
    # Seed 0 advances by one letter; both prompts have the same seeds, as if sent alone.
    assert (texts(answer)[0], texts(answer)[2]) == ("bc", "lm")
    assert answer["usage"]["prompt_tokens"] == 4


def test_best_of_returns_the_likeliest(rig: Rig):
    answer = rig.complete("a", n=1, best_of=8, temperature=1, seed=4, max_tokens=2).json()
    smallest = min(1 + request.sampling.seed % 5 for request in rig.engine.submitted)
    assert texts(answer) == ["".join(chr(ord("a") + smallest * i) for i in (1, 2))]
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["logprobs"] is None


def test_logprobs(rig: Rig):
    logprobs = rig.complete("a", logprobs=2, max_tokens=2).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["b", "c"],
        "token_logprobs": [-0.125, -0.25],
        "top_logprobs": [{"b": -0.125, "c": -1.125}, {"c": -0.25, "d": -1.25}],
        "text_offset": [0, 1],
    }


def test_logprobs_zero_gives_the_tokens_alone(rig: Rig):
    logprobs = rig.complete("a", logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"b": -0.125}]


def test_stream(rig: Rig):
    response = rig.complete(["a", "k"], stream=True, max_tokens=2, stream_options={"include_usage": True})
    *lines, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    *pieces, last = [json.loads(line.removeprefix("data: ")) for line in lines]
    said = ["", ""]
    ends = {}
    for piece in pieces:
        for choice in piece["choices"]:
            said[choice["index"]] += choice["text"]
            if choice["finish_reason"] is not None:
                ends[choice["index"]] = choice["finish_reason"]
    assert said == ["bc", "lm"]
    assert ends == {0: "length", 1: "length"}
    assert last["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("last", [False, True])
def test_the_usage_so_far_is_in_every_chunk_if_it_is_wanted(rig: Rig, last: bool):
    rig.engine.cached_tokens = 1
    options = {"continuous_usage_stats": True, "include_usage": last}
    response = rig.complete("a", n=2, stream=True, max_tokens=2, stream_options=options)
    pieces = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 4)
    assert pieces[0]["usage"]["total_tokens"] == 3
    assert {piece["usage"]["prompt_tokens_details"]["cached_tokens"] for piece in pieces[1:]} == {1}
    assert (pieces[-1]["choices"] == []) == last


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/v1//models", "/v1/models/", "//v1/models"])
def test_models(rig: Rig, path: str):
    (model,) = rig.client.get(path).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake/alphabet", "model", 512)


def test_one_model(rig: Rig):
    assert rig.client.get("/v1/models/fake/alphabet").json()["id"] == "fake/alphabet"
    response = rig.client.get("/v1/models/other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
