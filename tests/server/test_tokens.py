"""Texts to tokens and back, in TGI's words and in vLLM's."""

from typing import Any

import pytest

from ..support.byte_tokenizer import BOS
from .conftest import Rig

USER = {"role": "user", "content": "a"}


def test_tokenize(rig: Rig):
    assert rig.post("/tokenize", inputs="aé").json() == [
        {"id": BOS, "text": "", "start": 0, "stop": 0},
        {"id": 97, "text": "a", "start": 0, "stop": 1},
        {"id": 0xC3, "text": "\N{REPLACEMENT CHARACTER}", "start": 1, "stop": 2},
        {"id": 0xA9, "text": "\N{REPLACEMENT CHARACTER}", "start": 2, "stop": 3},
    ]


def test_chat_tokenize(rig: Rig):
    answer = rig.post("/chat_tokenize", messages=[{"role": "user", "content": "a"}]).json()
    assert answer["templated_text"] == "[user]a|[assistant]"
    assert [token["text"] for token in answer["tokenize_response"]] == list("[user]a|[assistant]")
    refused = rig.post("/chat_tokenize", messages=[{"role": "system", "content": "refuse me"}])
    assert refused.status_code == 422
    assert refused.json()["error_type"] == "template_error"
    assert refused.json()["error"].startswith("Template error: ")


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_a_prompt_is_answered_with_ids(rig: Rig, path: str):
    answer = {"count": 2, "max_model_len": 512, "tokens": [BOS, 97], "token_strs": None}
    assert rig.post(path, prompt="a").json() == answer
    fields = {"prompt": "a", "add_special_tokens": False, "return_token_strs": True}
    assert rig.post(path, **fields).json() == {
        "count": 1, "max_model_len": 512, "tokens": [97], "token_strs": ["a"],
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_a_chat_is_answered_with_ids(rig: Rig, path: str):
    said = {"role": "assistant", "content": "b"}
    chats: list[tuple[dict[str, Any], str]] = [
        ({}, "[user]a|[assistant]"),
        ({"add_generation_prompt": False}, "[user]a|"),
        ({"chat_template_kwargs": {"thinking": True}}, "{thinking=True}[user]a|[assistant]"),
        ({"messages": [USER, said], "continue_final_message": True, "add_generation_prompt": False}, "[user]a|[assistant]b"),
    ]  # fmt: skip
    for fields, text in chats:
        answer = rig.post(path, **{"model": "x", "messages": [USER], **fields}).json()
        assert (answer["count"], bytes(answer["tokens"]).decode()) == (len(text), text)
    answer = rig.post(path, messages=[USER], return_token_strs=True).json()
    assert "".join(answer["token_strs"]) == "[user]a|[assistant]"


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
@pytest.mark.parametrize("name", ["tokens", "ids"])
def test_detokenize(rig: Rig, path: str, name: str):
    ids = rig.post("/tokenize", prompt="aé").json()["tokens"]
    assert rig.post(path, **{name: ids}).json() == {"text": "<bos>aé", "prompt": "<bos>aé"}
    assert rig.post(path, **{name: ids}, skip_special_tokens=True).json()["text"] == "aé"
    assert rig.post(path, **{name: []}).json()["text"] == ""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("tokenize", {}),
        ("tokenize", {"inputs": 5}),
        ("tokenize", {"messages": []}),
        ("tokenize", {"messages": [USER], "chat_template": "x"}),
        ("tokenize", {"messages": [USER], "add_special_tokens": True}),
        ("detokenize", {}),
        ("detokenize", {"tokens": ["a"]}),
        ("detokenize", {"tokens": [-1]}),
        ("detokenize", {"ids": [0, 10_000]}),
    ],
)
def test_refusals(rig: Rig, path: str, body: dict[str, Any]):
    native = rig.post(f"/{path}", **body)
    assert (native.status_code, native.json()["error_type"]) == (422, "validation")
    openai = rig.post(f"/v1/{path}", **body)
    assert (openai.status_code, openai.json()["error"]["type"]) == (400, "invalid_request_error")
