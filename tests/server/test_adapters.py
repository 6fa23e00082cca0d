"""Adapters through the front: how each API asks for one, where they are listed, and 404 for those that are not there."""

from dataclasses import replace
from typing import Any

import pytest

from .conftest import Rig

MESSAGES = [{"role": "user", "content": "a"}]
ASKED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}, "model"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2}, "model"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 2}, "model"),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 2}, "model"),
    ("/generate", {"inputs": "a"}, "adapter_id"),
]


@pytest.fixture
def adapted(rig: Rig) -> Rig:
    info = replace(rig.engine.info_value, adapters=("law", "org/poems"))
    rig.backend.ready(rig.engine, rig.backend.serving().tokenizer, info)
    return rig


@pytest.mark.parametrize(("path", "body", "key"), ASKED, ids=[path for path, _, _ in ASKED])
def test_a_request_names_its_adapter(adapted: Rig, path: str, body: dict[str, Any], key: str) -> None:
    def asking(name: str | None) -> dict[str, Any]:
        if key == "model":
            return {**body, "model": name or "fake/alphabet"}
        return {**body, "parameters": {"max_new_tokens": 2, key: name}}

    for name in ("org/poems", None):
        answer = adapted.client.post(path, json=asking(name))
        assert answer.status_code == 200, answer.text
        assert adapted.engine.submitted[-1].adapter == (name or "")
        if key == "model":
            assert answer.json()["model"] == (name or "fake/alphabet")
    count = len(adapted.engine.submitted)
    refused = adapted.client.post(path, json=asking("none such"))
    assert refused.status_code == 404
    assert "law" in refused.text
    assert len(adapted.engine.submitted) == count


def test_models_lists_them_behind_the_model(adapted: Rig) -> None:
    listed = adapted.client.get("/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [
        ("fake/alphabet", None), ("law", "fake/alphabet"), ("org/poems", "fake/alphabet"),
    ]  # fmt: skip
    assert adapted.client.get("/v1/models/org/poems").json()["id"] == "org/poems"
    assert adapted.client.get("/v1/models/org/prose").status_code == 404
