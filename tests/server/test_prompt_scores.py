"""A prompt's own log-probabilities: `echo`, `prompt_logprobs`, `decoder_input_details`. By the fakes' arithmetic token i
of a prompt (from 1) has -i / 8, and its alternative j the id j above it, at -(i + j) / 8.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from xlane.engine import Request, SamplingParams, StepOutput, TokenOutput
from xlane.server.config import ServerConfig
from xlane.server.detokenize import Detokenizer
from xlane.server.generate import Progress, Run, run_one
from xlane.server.metrics import Metrics
from xlane.server.prompt_scores import moved, prompt_tokens

from ..support.byte_tokenizer import BOS, ByteTokenizer
from ..support.fake_engine import FakeEngine
from .conftest import Rig

ECHOED = {
    "tokens": ["<bos>", "a", "b", "c", "d"],
    "token_logprobs": [None, -0.125, -0.25, -0.125, -0.25],
    "top_logprobs": [
        None,
        {"a": -0.125, "b": -0.25},
        {"b": -0.25, "c": -0.375},
        {"c": -0.125, "d": -1.125},
        {"d": -0.25, "e": -1.25},
    ],
    "text_offset": [0, 0, 1, 2, 3],
}
"""`ab` and the two tokens after it, with two alternatives each."""


def choices(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def streamed(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")[:-2]]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {name: [] for name in ECHOED}
    for piece in pieces:
        for name, values in (piece["logprobs"] or {}).items():
            whole[name] += values
    return whole


def test_echo_is_the_text_alone(rig: Rig):
    (choice,) = choices(rig.complete("ab", echo=True, max_tokens=2))
    assert (choice["text"], choice["logprobs"]) == ("abcd", None)
    assert rig.engine.submitted[0].prompt_logprobs is None


def test_echo_with_logprobs(rig: Rig):
    (choice,) = choices(rig.complete("ab", echo=True, logprobs=2, max_tokens=2))
    assert (choice["text"], choice["logprobs"]) == ("abcd", ECHOED)


def test_echo_in_a_stream(rig: Rig):
    pieces = streamed(rig.complete("ab", echo=True, logprobs=2, max_tokens=2, stream=True))
    assert [piece["text"] for piece in pieces] == ["ab", "c", "d", ""]
    assert joined(pieces) == ECHOED
    assert pieces[-1]["finish_reason"] == "length"
    pieces = streamed(rig.complete("ab", echo=True, max_tokens=1, stream=True))
    assert [(piece["text"], piece["logprobs"]) for piece in pieces] == [("ab", None), ("c", None), ("", None)]


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_generates_nothing(rig: Rig, stream: bool):
    """What evaluation harnesses send; they look at all but the last token with max_tokens 1, at all with 0."""
    response = rig.complete([[97, 98], [107]], echo=True, logprobs=1, max_tokens=0, stream=stream)
    first, second = (
        [[piece for piece in streamed(response) if piece["index"] == i] for i in (0, 1)]
        if stream
        else [[choice] for choice in choices(response)]
    )
    assert "".join(piece["text"] for piece in first) == "ab"
    assert joined(first)["token_logprobs"] == [None, -0.125]
    assert joined(first)["top_logprobs"] == [None, {"b": -0.125}]
    assert joined(second)["tokens"] == ["k"]
    assert [piece["finish_reason"] for piece in (first[-1], second[-1])] == ["length", "length"]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1},
        {"max_tokens": 9, "stop": ["é!"]},
        {"max_tokens": 9, "ignore_eos": True, "stop_token_ids": [97]},
    ],
)
def test_every_generated_token_has_its_entry(rig: Rig, echo: bool, fields: dict[str, Any]):
    """Harnesses leave out as many entries as tokens they asked for, whatever those are."""
    for reply in ("", "x", "aé!"):
        rig.engine.reply = reply
        asked = {"prompt": [97, 98], "logprobs": 1, "echo": echo, **fields}
        answer = rig.complete(**asked).json()
        whole = answer["choices"][0]["logprobs"]
        counted = answer["usage"]["completion_tokens"] + 2 * echo
        assert {name: len(values) for name, values in whole.items()} == dict.fromkeys(ECHOED, counted)
        assert whole["text_offset"] == sorted(whole["text_offset"])
        assert joined(streamed(rig.complete(**asked, stream=True))) == whole


def test_an_end_of_sequence_is_told_by_name(rig: Rig):
    rig.engine.reply = ""
    (choice,) = choices(rig.complete([97, 98], echo=True, logprobs=1, max_tokens=1))
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "b", "<eos>"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.125, -0.125]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_scoring_counts_no_token(rig: Rig):
    usage = rig.complete("ab", echo=True, max_tokens=0).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)
    rig.engine.reply = ""  # the one token is an end of sequence
    assert choices(rig.complete("ab", echo=True, max_tokens=0))[0]["finish_reason"] == "length"
    assert "tgi_request_generated_tokens_sum 0.0" in rig.client.get("/metrics").text


def test_max_tokens_zero_needs_something_to_tell(rig: Rig):
    response = rig.complete("ab", max_tokens=0)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")


def test_every_choice_of_every_prompt_begins_with_its_prompt(rig: Rig):
    answer = choices(rig.complete(["ab", "k"], echo=True, n=2, logprobs=0, max_tokens=1, seed=0))
    assert [choice["text"][:-1] for choice in answer] == ["ab", "ab", "k", "k"]
    assert [len(choice["logprobs"]["tokens"]) for choice in answer] == [4, 4, 3, 3]


def test_best_of_returns_the_kept_choice_behind_its_own_prompt(rig: Rig):
    answer = choices(rig.complete(["ab", "k"], echo=True, n=1, best_of=2, temperature=1, max_tokens=1))
    assert [choice["text"][:-1] for choice in answer] == ["ab", "k"]


def test_vllms_prompt_logprobs(rig: Rig):
    (choice,) = choices(rig.complete("ab", prompt_logprobs=2, max_tokens=0))
    assert choice["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -0.125, "rank": 1, "decoded_token": "a"},
            "98": {"logprob": -0.25, "rank": 2, "decoded_token": "b"},
        },
        {
            "98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"},
            "99": {"logprob": -0.375, "rank": 2, "decoded_token": "c"},
        },
    ]
    assert choice["text"] == ""


def test_vllms_prompt_logprobs_beside_echo_with_more_alternatives(rig: Rig):
    (choice,) = choices(rig.complete("a", prompt_logprobs=0, echo=True, logprobs=2, max_tokens=1))
    assert choice["prompt_logprobs"] == [
        None,
        {"97": {"logprob": -0.125, "rank": None, "decoded_token": "a"}},
    ]
    assert choice["logprobs"]["top_logprobs"][1] == {"a": -0.125, "b": -0.25}


def test_vllms_prompt_logprobs_of_a_chat(rig: Rig):
    answer = rig.chat("a", prompt_logprobs=1, n=2).json()
    texts = [next(iter(scored.values()))["decoded_token"] for scored in answer["prompt_logprobs"][1:]]
    assert "".join(texts) == "[user]a|[assistant]"[1:]


@pytest.mark.parametrize(
    "fields",
    [{"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": 1, "stream": True}],
)
def test_prompt_logprobs_that_are_refused(rig: Rig, fields: dict[str, Any]):
    for response in (rig.complete("a", **fields), rig.chat("a", **fields)):
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_a_prompt_of_too_many_scores_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("xlane.engine.request.MAX_PROMPT_LOGPROBS", 12)
    assert rig.complete("abc", prompt_logprobs=2).status_code == 200  # four tokens of three each
    for response in (rig.complete("abc", prompt_logprobs=3), rig.complete("abcd", echo=True, logprobs=2)):
        assert response.status_code == 400
        assert "can be at most 12" in response.json()["error"]["message"]


def test_decoder_input_details(rig: Rig):
    details = rig.generate("ab", decoder_input_details=True).json()["details"]
    assert details["prefill"] == [
        {"id": BOS, "text": "<bos>", "logprob": None},
        {"id": 97, "text": "a", "logprob": -0.125},
        {"id": 98, "text": "b", "logprob": -0.25},
    ]
    assert [token["logprob"] for token in details["tokens"]] == [-0.125, -0.25, -0.375, -0.5]


def test_decoder_input_details_of_what_truncate_left(rig: Rig):
    details = rig.generate("abcd", decoder_input_details=True, truncate=2).json()["details"]
    assert [token["text"] for token in details["prefill"]] == ["<bos>", "d"]


def test_decoder_input_details_of_all_sequences(rig: Rig):
    details = rig.generate("a", decoder_input_details=True, best_of=2, do_sample=True).json()["details"]
    assert details["best_of_sequences"][0]["prefill"] == details["prefill"] != []


def test_decoder_input_details_of_a_stream_are_refused(rig: Rig):
    response = rig.post("/generate_stream", inputs="a", parameters={"decoder_input_details": True})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert "`decoder_input_details` == true is not supported when streaming" in response.json()["error"]


class TestSwitchedOff:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(prompt_logprobs=False)

    def test_is_said_by_name(self, rig: Rig):
        for response, name in (
            (rig.complete("a", echo=True, logprobs=1), "echo"),
            (rig.complete("a", prompt_logprobs=1), "prompt_logprobs"),
            (rig.chat("a", prompt_logprobs=1), "prompt_logprobs"),
            (rig.generate("a", decoder_input_details=True), "decoder_input_details"),
        ):
            assert response.status_code in (400, 422)
            assert f"`{name}` is switched off" in response.text
            assert "--enable-prefill-logprobs" in response.text

    def test_leaves_echo_without_log_probabilities(self, rig: Rig):
        assert choices(rig.complete("a", echo=True, max_tokens=1))[0]["text"] == "ab"


def test_texts_of_a_prompt_are_whole_characters():
    ids = list("é!".encode())
    tokens = prompt_tokens(ByteTokenizer(), ids, [TokenOutput(i, -1.0) for i in ids[1:]])
    assert [(token.text, token.start, token.logprob) for token in tokens] == [
        ("", 0, None),
        ("é", 0, -1.0),
        ("!", 1, -1.0),
    ]
    assert [token.start for token in moved(tokens, 4)] == [4, 4, 5]


def test_a_prompt_is_told_of_once_though_an_engine_that_takes_over_tells_of_it_again():
    class Repeating(FakeEngine):
        async def submit(self, request: Request) -> AsyncIterator[StepOutput]:  # type: ignore[override]
            async for step in super().submit(request):
                yield replace(step, prompt=(TokenOutput(2, -0.5),))

    sampling = SamplingParams(max_tokens=3)
    request = Request(id="r", prompt_ids=(1, 2), sampling=sampling, prompt_logprobs=0)
    run = Run(request, Detokenizer(ByteTokenizer()))

    async def collected() -> list[Progress]:
        return [progress async for progress in run_one(Repeating(), run, Metrics())]

    told = asyncio.run(collected())
    assert [progress.prompt for progress in told] == [(TokenOutput(2, -0.5),), (), ()]
    assert told[-1].done is not None
    assert told[-1].done.prompt == (TokenOutput(2, -0.5),)
