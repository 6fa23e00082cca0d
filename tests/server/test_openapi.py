"""The API's description: it is valid, complete, and true of what the fake server answers. `/docs` needs no network."""

import json
import re
from typing import Any

import orjson
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route
from starlette.testclient import TestClient

from xlane.server import cli
from xlane.server.app import create_app, routes
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.openapi import build
from xlane.server.operations import OPERATIONS

from .conftest import Rig

Document = dict[str, Any]
MESSAGES = [{"role": "user", "content": "a"}]


def described(config: ServerConfig | None = None) -> Document:
    with TestClient(create_app(Backend(), config or ServerConfig())) as client:
        return client.get("/api-doc/openapi.json").json()


DOCUMENT = described()
OPERATIONS_BY_PLACE = {
    (path, method): operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}


def strict(schema: Any) -> Any:
    """The same schema, in which an object has no fields but those that are named."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


STRICT_COMPONENTS = strict(DOCUMENT["components"])


def complaints(schema: Any, value: Any) -> list[str]:
    whole = {**strict(schema), "components": STRICT_COMPONENTS}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(whole).iter_errors(value)]


def check(response: Any, place: tuple[str, str]) -> None:
    """Whether an answer is one that the document tells of."""
    told = OPERATIONS_BY_PLACE[place]["responses"][str(response.status_code)]
    content = told.get("content")
    media = response.headers.get("content-type", "").partition(";")[0]
    if not content:
        assert response.content == b""
    elif media == "text/event-stream":
        events = [
            line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")
        ]
        assert events
        for event in events:
            if event != "[DONE]":
                assert complaints(content[media]["x-event-schema"], json.loads(event)) == []
    elif media == "application/json":
        assert complaints(content[media]["schema"], response.json()) == []
    else:
        assert any(kind.startswith(media) for kind in content)


def test_the_document_is_valid():
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []
    names = [operation["operationId"] for operation in OPERATIONS_BY_PLACE.values()]
    assert len(names) == len(set(names))


def test_every_route_is_told_of_and_nothing_else():
    served = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in routes(ServerConfig())
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == set(OPERATIONS_BY_PLACE)


def test_every_entry_belongs_to_a_route():
    handlers = {route.endpoint for route in routes(ServerConfig())}
    assert [handler.__name__ for handler in OPERATIONS if handler not in handlers] == []


def test_a_route_without_an_entry_is_told_of_by_its_docstring():
    async def novelty(request: object) -> None:
        """Does a new thing."""

    document = build([Route("/new/{name}", novelty, methods=["POST"])], version="1", keyed=False)
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []
    assert document["paths"]["/new/{name}"]["post"]["summary"] == "Does a new thing."  # type: ignore[index]


def test_the_paths_that_vertex_chose_are_told_of():
    document = described(ServerConfig(predict_route="/p", health_route="/h", api_key="k"))
    assert (
        document["paths"]["/p"]["post"]["requestBody"] == document["paths"]["/vertex"]["post"]["requestBody"]
    )
    assert set(document["paths"]["/h"]["get"]["responses"]) == {"200", "503"}
    assert document["paths"]["/p"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/h"]["get"]


def test_every_field_of_a_body_is_told():
    parameters = DOCUMENT["components"]["schemas"]["GenerateParameters"]["properties"]
    assert {"max_new_tokens", "top_n_tokens", "return_full_text"} <= set(parameters)


POSTS = [
    place for place, told in OPERATIONS_BY_PLACE.items() if place[1] == "post" and told["tags"] != ["Other"]
]
GETS = [place for place in OPERATIONS_BY_PLACE if place[1] == "get"]


def url(place: tuple[str, str]) -> str:
    return place[0].replace("{model}", "fake/alphabet").replace("{version}", "1")


@pytest.mark.parametrize("place", GETS, ids=lambda place: place[0])
def test_what_is_read_is_as_told(rig: Rig, place: tuple[str, str]):
    response = rig.client.get(url(place))
    assert response.status_code == 200
    check(response, place)


@pytest.mark.parametrize("place", POSTS, ids=str)
def test_every_example_works_and_its_answer_is_as_told(rig: Rig, place: tuple[str, str]):
    body = OPERATIONS_BY_PLACE[place]["requestBody"]["content"]["application/json"]
    assert complaints(body["schema"], body["example"]) == []
    if place[0] == "/v1/unload_lora_adapter":
        rig.post("/v1/load_lora_adapter", **body["example"], lora_path=".")
    response = rig.post(url(place), **body["example"])
    assert response.status_code == 200
    check(response, place)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/generate",
            {"inputs": "a", "parameters": {"details": True, "top_n_tokens": 2, "max_new_tokens": 3}},
        ),
        ("/generate", {"inputs": "a", "parameters": {"details": True, "best_of": 2, "do_sample": True}}),
        ("/generate_stream", {"inputs": "a", "parameters": {"details": True, "top_n_tokens": 2, "seed": 1}}),
        ("/generate", {"inputs": "ab", "parameters": {"decoder_input_details": True, "max_new_tokens": 2}}),
        ("/generate_stream", {"inputs": "a", "parameters": {"decoder_input_details": True}}),
        ("/", {"inputs": "a", "stream": True}),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "n": 2}),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "stream": True, "logprobs": True, "max_tokens": 3}),
        ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "max_tokens": 3}),
        ("/v1/completions", {"prompt": [97], "stream": True, "logprobs": 1, "max_tokens": 3}),
        (
            "/v1/completions",
            {"prompt": [97, 98], "stream": True, "echo": True, "logprobs": 1, "max_tokens": 0},
        ),
        (
            "/v1/completions",
            {"prompt": "ab", "echo": True, "logprobs": 1, "prompt_logprobs": 2, "max_tokens": 2},
        ),
        ("/v1/completions", {"prompt": "ab", "logit_bias": {"97": 1}, "min_tokens": 2, "max_tokens": 3}),
        ("/v1/completions", {"prompt": "ab", "logit_bias": {"999": 1}}),
        ("/v1/chat/completions", {"messages": MESSAGES, "prompt_logprobs": 1, "max_tokens": 2}),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "stream": True, "stream_options": {"continuous_usage_stats": True}},
        ),
        ("/invocations", {"messages": MESSAGES, "stream": True}),
        ("/invocations", {"prompt": "a"}),
        ("/vertex", {"instances": [{"inputs": "a", "parameters": {"details": True}}]}),
        ("/generate", {"inputs": ""}),
        ("/generate", {}),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}),
        ("/v1/responses", {"input": "a", "stream": True}),
        ("/v1/responses", {"input": []}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3, "stream": True}),
        ("/v1/messages", {"messages": []}),
        ("/v1/messages/count_tokens", {"messages": MESSAGES, "model": "other"}),
        ("/v1/completions", {"prompt": "a", "model": "other"}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 9}),
        ("/invocations", {"messages": []}),
        ("/vertex", {"instances": []}),
        ("/v2/models/{model}/infer", {"inputs": []}),
        ("/chat_tokenize", {"messages": []}),
    ],
)
def test_other_answers_are_as_told(rig: Rig, path: str, body: dict[str, Any]):
    check(rig.post(url((path, "post")), **body), (path, "post"))


@pytest.mark.parametrize("place", POSTS + GETS, ids=str)
def test_before_there_is_an_engine(place: tuple[str, str]):
    body = OPERATIONS_BY_PLACE[place].get("requestBody", {}).get("content", {}).get("application/json", {})
    with TestClient(create_app(Backend(), ServerConfig())) as client:
        response = client.request(place[1].upper(), url(place), json=body.get("example"))
    assert response.status_code in (200, 503)
    check(response, place)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["print-schema"], {}) == 0
    assert orjson.loads(capsys.readouterr().out) == DOCUMENT
    assert cli.run(["print-schema", "--api-key", "k"], {}) == 0
    assert orjson.loads(capsys.readouterr().out)["paths"]["/vertex"]["post"]["security"] == [{"key": []}]


def test_the_page_needs_nothing_from_elsewhere(rig: Rig):
    response = rig.client.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "://" not in response.text
    assert set(re.findall(r"""(?:src|href)="([^"#]*)""", response.text)) == {"api-doc/openapi.json"}
