"""/generate, /generate_stream and /, against the engine that says the alphabet."""

import json
from typing import Any

import pytest

from xlane.engine import EngineLost, Overloaded, RequestFailed

from ..support.byte_tokenizer import BOS, EOS
from .conftest import Rig


def events(text: str) -> list[dict[str, Any]]:
    """The values of a stream, whose framing is checked on the way."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def streamed(rig: Rig, inputs: str = "a", **parameters: Any) -> list[dict[str, Any]]:
    response = rig.post("/generate_stream", inputs=inputs, parameters={"max_new_tokens": 3, **parameters})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


def test_generate(rig: Rig):
    response = rig.generate("ab")
    assert response.status_code == 200
    assert response.json() == {"generated_text": "cdef"}
    assert rig.engine.submitted[0].prompt_ids == (BOS, *b"ab")
    assert not rig.engine.submitted[0].sampling.logprobs


def test_headers(rig: Rig):
    headers = rig.generate("ab").headers
    assert headers["x-compute-type"] == "1-fake"
    assert headers["x-compute-characters"] == "2"
    assert headers["x-prompt-tokens"] == "3"
    assert headers["x-generated-tokens"] == "4"
    assert (headers["x-queue-time"], headers["x-inference-time"]) == ("1", "2")
    assert float(headers["x-compute-time"]) > 0
    assert {"x-total-time", "x-validation-time", "x-time-per-token"} <= set(headers)


def test_details(rig: Rig):
    details = rig.generate("a", max_new_tokens=2, details=True, top_n_tokens=2).json()["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 2
    assert details["seed"] is None
    assert details["prefill"] == []
    assert details["tokens"][0] == {"id": ord("b"), "text": "b", "logprob": -0.125, "special": False}
    assert [len(top) for top in details["top_tokens"]] == [2, 2]
    assert "best_of_sequences" not in details


def test_end_of_sequence(rig: Rig):
    rig.engine.reply = "hé"
    answer = rig.generate(max_new_tokens=10, details=True).json()
    assert answer["generated_text"] == "hé"
    assert answer["details"]["finish_reason"] == "eos_token"
    assert [token["text"] for token in answer["details"]["tokens"]] == ["h", "", "é", "<eos>"]
    assert answer["details"]["tokens"][-1]["special"]
    assert "top_tokens" not in answer["details"]


@pytest.mark.parametrize("stop", ["de", ["zz", "de"]])
def test_a_stop_string_stays_in_the_text(rig: Rig, stop: Any):
    answer = rig.generate("a", max_new_tokens=20, stop=stop, details=True).json()
    assert answer["generated_text"] == "bcde"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] == 4
    assert rig.engine.cancelled == [rig.engine.submitted[0].id]


def test_a_stop_string_inside_a_step_of_several_tokens(rig: Rig):
    rig.engine.tokens_per_step = 8
    answer = rig.generate("a", max_new_tokens=20, stop=["cd"], details=True).json()
    assert (answer["generated_text"], answer["details"]["generated_tokens"]) == ("bcd", 3)


def test_the_seed_is_told_when_sampling(rig: Rig):
    answer = rig.generate("a", do_sample=True, seed=1, details=True).json()
    assert answer["generated_text"] == "cegi"
    assert answer["details"]["seed"] == 1


def test_best_of_returns_the_likeliest_and_shows_the_others(rig: Rig):
    details = rig.generate("a", best_of=2, do_sample=True, details=True).json()["details"]
    (loser,) = details["best_of_sequences"]
    means = [sum(t["logprob"] for t in d["tokens"]) / d["generated_tokens"] for d in (details, loser)]
    assert means[0] >= means[1]
    assert len({request.sampling.seed for request in rig.engine.submitted}) == 2
    assert {details["seed"], loser["seed"]} == {r.sampling.seed for r in rig.engine.submitted}
    assert set(loser) >= {"generated_text", "finish_reason", "generated_tokens", "prefill", "tokens"}


def test_truncate_keeps_the_end_and_the_beginning_of_sequence_token(rig: Rig):
    rig.generate("abcdef", truncate=3)
    assert rig.engine.submitted[0].prompt_ids == (BOS, *b"ef")


def test_max_new_tokens_fills_the_context_by_default(rig: Rig):
    rig.generate("a", max_new_tokens=None)
    assert rig.engine.submitted[0].sampling.max_tokens == 512 - 2


def test_nulls_and_unknown_fields_are_absent_ones(rig: Rig):
    names = (
        "best_of temperature repetition_penalty frequency_penalty top_k top_p typical_p do_sample "
        "return_full_text stop truncate watermark details decoder_input_details seed top_n_tokens grammar adapter_id"
    )
    response = rig.generate(**dict.fromkeys(names.split()), no_such_parameter=1)
    assert response.json() == {"generated_text": "bcde"}


def test_parameters_reach_the_engine(rig: Rig):
    rig.generate(
        "a",
        temperature=0.5,
        top_k=7,
        top_p=0.5,
        typical_p=0.25,
        repetition_penalty=1.5,
        frequency_penalty=-1.0,
    )
    sampling = rig.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 7, 0.5, 0.25)
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.5, -1.0)
    assert sampling.stop_ids[0] == EOS


def test_sampling_does_not_depend_on_whether_parameters_are_sent(rig: Rig):
    rig.post("/generate", inputs="a")
    rig.post("/generate", inputs="a", parameters={})
    assert [request.sampling.temperature for request in rig.engine.submitted] == [0.0, 0.0]


def test_stream(rig: Rig):
    rig.engine.reply = "hé"
    first, half, whole, last = streamed(rig, max_new_tokens=9, details=True, top_n_tokens=1)
    assert first["index"] == 1
    assert first["token"] == {"id": ord("h"), "text": "h", "logprob": -0.125, "special": False}
    assert [t["text"] for t in first["top_tokens"]] == ["h"]
    assert (first["generated_text"], first["details"]) == (None, None)
    assert (half["token"]["text"], whole["token"]["text"]) == ("", "é")
    assert last["token"]["special"]
    assert last["generated_text"] == "hé"
    assert last["details"] == {
        "finish_reason": "eos_token", "generated_tokens": 4, "seed": None, "input_length": 2,
    }  # fmt: skip


def test_stream_without_details(rig: Rig):
    last = streamed(rig)[-1]
    assert (last["index"], last["generated_text"], last["details"]) == (3, "bcd", None)
    assert "top_tokens" not in last


def test_stream_headers(rig: Rig):
    headers = rig.post("/generate_stream", inputs="abc", parameters={"max_new_tokens": 1}).headers
    assert headers["x-compute-characters"] == "3"
    assert headers["x-accel-buffering"] == "no"
    assert headers["cache-control"] == "no-cache"
    assert "content-length" not in headers


def test_several_tokens_in_a_step_are_several_events(rig: Rig):
    rig.engine.tokens_per_step = 2
    assert [e["index"] for e in streamed(rig, max_new_tokens=5)] == [1, 2, 3, 4, 5]


def test_compat_wraps_the_answer_in_a_list_and_shows_the_prompt(rig: Rig):
    assert rig.post("/", inputs="a", parameters={"max_new_tokens": 2}).json() == [{"generated_text": "abc"}]
    quiet = {"max_new_tokens": 2, "return_full_text": False}
    assert rig.post("/", inputs="a", parameters=quiet).json() == [{"generated_text": "bc"}]
    response = rig.post("/", inputs="a", parameters=quiet, stream=True)
    assert events(response.text)[-1]["generated_text"] == "bc"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", 3.2), 429, "overloaded"),
        (RequestFailed("NaN"), 424, "generation"),
        (EngineLost("gone"), 424, "generation"),
        (ValueError("secret"), 500, "internal"),
    ],
)
def test_errors_before_the_first_token_have_a_status(
    rig: Rig, path: str, error: Exception, status: int, kind: str
):
    rig.engine.refuse_with = error
    response = rig.post(path, inputs="a", stream=path == "/")
    assert response.status_code == status
    assert response.json()["error_type"] == kind
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == {Overloaded: "4", EngineLost: "1"}.get(type(error))


def test_errors_after_the_first_token_are_events(rig: Rig):
    rig.engine.fail_with = RequestFailed("NaN")
    last = streamed(rig, max_new_tokens=9)[-1]
    assert last == {"error": "Request failed during generation: NaN", "error_type": "generation"}


def test_a_sequence_the_engine_gives_up(rig: Rig):
    rig.engine.abort_after = 2
    assert streamed(rig, max_new_tokens=9)[-1]["error_type"] == "incomplete_generation_stream"
    response = rig.generate(max_new_tokens=9)
    assert (response.status_code, response.json()["error_type"]) == (500, "incomplete_generation")


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_validation_has_a_status_on_streams_too(rig: Rig, path: str):
    response = rig.post(path, inputs="a", parameters={"temperature": 0})
    assert response.status_code == 422
    assert response.json() == {
        "error": "Input validation error: `temperature` must be strictly positive",
        "error_type": "validation",
    }


def test_a_prompt_that_cannot_fit_is_refused_unread(rig: Rig):
    response = rig.generate("a" * 300_000)
    assert response.status_code == 422
    assert "Given: at least" in response.json()["error"]


def test_invocations_take_any_body(rig: Rig):
    native = rig.post("/invocations", inputs="a", parameters={"max_new_tokens": 1})
    assert native.json() == [{"generated_text": "ab"}]
    chat = rig.post("/invocations", messages=[{"role": "user", "content": "x"}], max_tokens=1)
    assert chat.json()["object"] == "chat.completion"
    assert rig.post("/invocations", prompt="a", max_tokens=1).json()["object"] == "text_completion"
    assert rig.post("/invocations", nothing=1).status_code == 422
    assert "message" in rig.post("/invocations", prompt="a", n=0).json()["error"]
