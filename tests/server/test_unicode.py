"""Every plane of Unicode through HTTP: streamed a byte at a time, an event never holds half a character."""

import json
from typing import Any

import pytest

from ..support.fake_engine import fake_info
from ..support.unicode_samples import PLANES, SEQUENCES, sampled
from .conftest import Rig

TEXTS = ["".join(SEQUENCES), *(sampled(plane, 2039) for plane in PLANES)]
"""Each short enough for one answer."""


@pytest.fixture
def roomy(rig: Rig) -> Rig:
    rig.engine.info_value = fake_info(max_total_tokens=4096)
    rig.backend.ready(rig.engine, rig.backend.serving().tokenizer, rig.engine.info_value)
    return rig


def _events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line for line in response.content.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(line[6:].decode()) for line in lines]  # bytes that are no UTF-8 would raise


def _tgi(rig: Rig) -> tuple[list[str], str]:
    parameters = {"max_new_tokens": 2048}
    events = _events(rig.post("/generate_stream", inputs="a", parameters=parameters))
    texts = [event["token"]["text"] for event in events if not event["token"]["special"]]
    whole = rig.post("/generate", inputs="a", parameters=parameters).json()["generated_text"]
    assert events[-1]["generated_text"] == whole
    return texts, whole


def _chat(rig: Rig) -> tuple[list[str], str]:
    events = _events(rig.chat(max_tokens=2048, stream=True))
    texts = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    return texts, rig.chat(max_tokens=2048).json()["choices"][0]["message"]["content"]


def _completions(rig: Rig) -> tuple[list[str], str]:
    events = _events(rig.complete(max_tokens=2048, stream=True))
    texts = [choice["text"] for event in events for choice in event["choices"]]
    return texts, rig.complete(max_tokens=2048).json()["choices"][0]["text"]


def _responses(rig: Rig) -> tuple[list[str], str]:
    body = {"model": "fake/alphabet", "input": "a", "max_output_tokens": 2048}
    events = _events(rig.post("/v1/responses", **body, stream=True))
    texts = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    return texts, rig.post("/v1/responses", **body).json()["output"][0]["content"][0]["text"]


def _messages(rig: Rig) -> tuple[list[str], str]:
    body = {"model": "fake/alphabet", "max_tokens": 2048, "messages": [{"role": "user", "content": "a"}]}
    events = _events(rig.post("/v1/messages", **body, stream=True))
    texts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    return texts, rig.post("/v1/messages", **body).json()["content"][0]["text"]


@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize(
    "ask", [_tgi, _chat, _completions, _responses, _messages], ids=lambda ask: ask.__name__
)
def test_no_event_holds_half_a_character(roomy: Rig, ask: Any, tokens_per_step: int):
    roomy.engine.tokens_per_step = tokens_per_step
    for text in TEXTS:
        roomy.engine.reply = text
        texts, whole = ask(roomy)
        assert "".join(texts) == whole == text
        assert sum(piece.count("\ufffd") for piece in texts) == text.count("\ufffd")


@pytest.mark.parametrize("stop", ["👧", "\u200d", "\U000e007f", "\U0010ffff"])
def test_a_stop_string_of_any_plane_cuts_between_characters(roomy: Rig, stop: str):
    roomy.engine.reply = text = "".join(SEQUENCES) + "\U0010ffff."
    events = _events(roomy.chat(max_tokens=2048, stop=[stop], stream=True))
    said = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert said == text[: text.index(stop)]


@pytest.mark.parametrize("path", ["/generate_stream", "/generate", "/v1/completions", "/v1/chat/completions"])
def test_half_a_pair_in_a_body_is_refused(rig: Rig, path: str):
    inner = '"\\ud83d"'
    bodies = {
        "/v1/completions": f'{{"prompt": {inner}}}',
        "/v1/chat/completions": f'{{"messages": [{{"role": "user", "content": {inner}}}]}}',
    }
    body = bodies.get(path, f'{{"inputs": {inner}}}')
    answer = rig.client.post(path, content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert not rig.engine.submitted
