"""Adapters through the front: how each API asks for one, where they are listed, 404 for those that are not there; and how they
come and go."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient

from xlane.server.answers_openai import ModelList
from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine
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
    rig.engine.info_value = info
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
    answer = adapted.client.get("/v1/models")
    msgspec.json.decode(answer.content, type=ModelList)  # is what the document says
    listed = answer.json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [
        ("fake/alphabet", None), ("law", "fake/alphabet"), ("org/poems", "fake/alphabet"),
    ]  # fmt: skip
    assert adapted.client.get("/v1/models/org/poems").json()["id"] == "org/poems"
    assert adapted.client.get("/v1/models/org/prose").status_code == 404


def test_they_come_and_go_as_in_vllm(adapted: Rig, tmp_path: Path) -> None:
    def listed() -> list[str]:
        return [one["id"] for one in adapted.client.get("/v1/models").json()["data"]]

    answer = adapted.post("/v1/load_lora_adapter", lora_name="new", lora_path=str(tmp_path))
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert adapted.engine.loaded == [("new", str(tmp_path))]
    assert listed() == ["fake/alphabet", "law", "org/poems", "new"]
    assert adapted.complete(model="new").json()["model"] == "new"
    answer = adapted.post("/v1/unload_lora_adapter", lora_name="law")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'law' removed successfully.")
    assert listed() == ["fake/alphabet", "org/poems", "new"]
    for gone in (adapted.complete(model="law"), adapted.post("/v1/unload_lora_adapter", lora_name="law")):
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("name", "path", "problem"),
    [
        ("law", ".", "loaded already; unload it first, or replace it with `load_inplace`"),
        ("fake/alphabet", ".", "is the model's own name"),
        (" ", ".", "has to have 1 to 200 characters"),
        ("new", "/no/such/folder", "no such directory, and no Hub repository"),
        ("new", ".", "no slot is free"),
    ],
)
def test_what_cannot_be_loaded_is_400_and_says_what_to_do(
    adapted: Rig, name: str, path: str, problem: str
) -> None:
    if problem == "no slot is free":
        adapted.post("/v1/load_lora_adapter", lora_name="third", lora_path=path)
    answer = adapted.post("/v1/load_lora_adapter", lora_name=name, lora_path=path)
    assert answer.status_code == 400
    assert problem in answer.json()["error"]["message"]


def test_one_may_be_replaced_in_place(adapted: Rig) -> None:
    answer = adapted.post("/v1/load_lora_adapter", lora_name="law", lora_path=".", load_inplace=True)
    assert answer.status_code == 200
    assert [name for name, _ in adapted.engine.loaded] == ["law"]


def test_with_keys_only_those_of_admins_change_them(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("user a-key\nboss b-key weight=2 admin\n")
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    config = ServerConfig(api_key="c-key", api_key_file=str(keys))
    with TestClient(create_app(backend, config)) as client:
        for path, body in (("load", {"lora_path": "."}), ("unload", {})):
            for key, status in (("x", 401), ("a-key", 403), ("b-key", 200), ("c-key", 200)):
                answer = client.post(
                    f"/v1/{path}_lora_adapter",
                    json={"lora_name": key, **body},
                    headers={"authorization": f"Bearer {key}"},
                )
                assert answer.status_code == status, answer.text
    assert (
        "'user' may not change"
        in client.post("/v1//load_lora_adapter/", json={}, headers={"authorization": "Bearer a-key"}).text
    )
    assert [name for name, _ in engine.loaded] == ["b-key", "c-key"]
