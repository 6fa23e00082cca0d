"""Guided answers of a real model, parsed and held against their schemas by another library: more than a hundred schemas, all
in the running batch at once."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from ..support.schemas import SCHEMAS
from ..support.whole_server import Served

MAX_TOKENS = 120
AT_ONCE = 32
"""More than there are lanes, and fewer than may wait."""


def _chat(number: int, schema: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": f"Example number {number}, please, as JSON."}]
    form = {"type": "json_schema", "json_schema": {"name": "example", "schema": schema, "strict": True}}
    # Half of them sampled: what a grammar lets through must not depend on what the model likes best.
    sampling = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0}
    body = {"messages": messages, "max_tokens": MAX_TOKENS, "response_format": form, **sampling}
    return "/v1/chat/completions", body


def _tgi(number: int, schema: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    parameters = {"max_new_tokens": MAX_TOKENS, "grammar": {"type": "json", "value": schema}, "details": True}
    return "/generate", {"inputs": f"Example number {number} as JSON:", "parameters": parameters}


async def _ask(client: httpx.AsyncClient, room: asyncio.Semaphore, path: str, body: Any) -> tuple[str, str]:
    """Text and reason."""
    async with room:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200, (body, answer.text)
    said = answer.json()
    if path == "/generate":
        return said["generated_text"], said["details"]["finish_reason"]
    return said["choices"][0]["message"]["content"], said["choices"][0]["finish_reason"]


def test_the_schemas_are_schemas_and_refuse_something():
    assert len(SCHEMAS) >= 100
    other: list[Any] = [None, "something else altogether", 12345678, [[[None]]], {"unknown": []}]
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema)
        assert not all(validator.is_valid(value) for value in other)


@pytest.fixture(scope="module")
def answers(demo: Served) -> dict[str, list[tuple[str, str]]]:
    """Of each schema: what chat says, and for every fourth what `/generate` says."""
    asked = [
        (name, make(number, schema))
        for number, (name, schema) in enumerate(SCHEMAS.items())
        for make in ((_chat, _tgi) if number % 4 == 0 else (_chat,))
    ]

    async def all_of_them() -> list[tuple[str, str]]:
        room = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=demo.url, timeout=300) as client:
            return await asyncio.gather(*(_ask(client, room, *request) for _, request in asked))

    said: dict[str, list[tuple[str, str]]] = {name: [] for name in SCHEMAS}
    for (name, _), answer in zip(asked, asyncio.run(all_of_them()), strict=True):
        said[name].append(answer)
    return said


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_keeps_to_its_schema(answers: dict[str, list[tuple[str, str]]], name: str):
    checker = Draft202012Validator.FORMAT_CHECKER
    for text, reason in answers[name]:
        assert reason in ("stop", "eos_token"), text
        Draft202012Validator(SCHEMAS[name], format_checker=checker).validate(json.loads(text))
