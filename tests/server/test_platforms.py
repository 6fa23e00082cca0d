"""Vertex AI, SageMaker and KServe: their routes over the fake engine, and the variables they set."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from xlane.server import flags
from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.cli import Settings, choose, settle
from xlane.server.config import ServerConfig
from xlane.server.options import UsageError

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine
from .conftest import Rig

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "temperature": 0}


def native(inputs: str = "a", **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": 3, **parameters}}


class TestVertex:
    def test_instances_of_both_kinds_are_answered_in_order(self, rig: Rig):
        answer = rig.post("/vertex", instances=[native("a"), CHAT, native("x")])
        assert answer.json() == {"predictions": ["bcd", "abc", "yza"]}
        assert rig.client.app.state.front.permits.taken == 0  # type: ignore[attr-defined]

    def test_every_parameter_counts(self, rig: Rig):
        one = rig.post("/vertex", instances=[native("a", return_full_text=True, stop=["c"])])
        assert one.json() == {"predictions": ["abc"]}
        rig.post("/vertex", instances=[native("a", do_sample=True, temperature=0.5, top_k=7, seed=3)])
        sampling = rig.engine.submitted[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 7, 3)

    def test_details_are_given_if_asked_for(self, rig: Rig):
        [answer] = rig.post("/vertex", instances=[native("a", details=True)]).json()["predictions"]
        assert answer["generated_text"] == "bcd"
        assert answer["details"]["generated_tokens"] == 3

    def test_best_of_returns_one(self, rig: Rig):
        instance = native("a", best_of=2, do_sample=True)
        assert len(rig.post("/vertex", instances=[instance, instance]).json()["predictions"]) == 2
        assert len(rig.engine.submitted) == 4

    def test_shared_parameters_hold_where_there_are_none(self, rig: Rig):
        body = {"instances": [{"inputs": "a"}, native("a")], "parameters": {"max_new_tokens": 2}}
        assert rig.post("/vertex", **body).json() == {"predictions": ["bc", "bcd"]}

    @pytest.mark.parametrize(
        ("instances", "message"),
        [
            ([], "Input validation error: `instances` cannot be empty"),
            ([{"prompt": "a"}], "instance 0 needs `inputs` or `messages`"),
            ([native(), 5], "instance 1 needs `inputs` or `messages`"),
            ([{"inputs": 5}], "instance 0: Expected `str`, got `int` - at `$.inputs`"),
            ([native(), native("")], "Input validation error: instance 1: `inputs` cannot be empty"),
            ([{**CHAT, "stream": True}], "Input validation error: instance 0: `stream` is not possible here"),
            ([{**CHAT, "n": 2}], "Input validation error: instance 0: `n` must be 1"),
            (
                [{**CHAT, "logprobs": True}],
                "Input validation error: instance 0: `logprobs` is not possible here",
            ),
            (
                [{**CHAT, "prompt_logprobs": 0}],
                "Input validation error: instance 0: `prompt_logprobs` is not",
            ),
            ([native()] * 129, "Input validation error: 129 sequences in one request"),
        ],
    )
    def test_what_is_wrong_is_told_with_its_place(self, rig: Rig, instances: list[Any], message: str):
        response = rig.post("/vertex", instances=instances)
        assert response.status_code == 422
        assert response.json()["error"].startswith(message)
        assert rig.engine.submitted == []

    def test_a_model_that_is_not_here(self, rig: Rig):
        response = rig.post("/vertex", instances=[{**CHAT, "model": "x"}])
        assert response.status_code == 404
        assert response.json()["error"].startswith("instance 0: The model 'x' does not exist")
        assert rig.engine.submitted == []

    def test_overload_is_429_not_500(self):
        async def main() -> list[int]:
            engine, backend = FakeEngine(first_delay_s=0.2), Backend()
            backend.ready(engine, ByteTokenizer(), engine.info_value)
            app = create_app(backend, ServerConfig(max_concurrent_requests=3))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
                body = {"instances": [native(), native()]}
                both = await asyncio.gather(*(client.post("/vertex", json=body) for _ in range(2)))
                return [response.status_code for response in both]

        assert sorted(asyncio.run(main())) == [200, 429]


class TestChosenRoutes:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(predict_route="/v1/endpoints/7:predict", health_route="/alive/", api_key="k")

    def test_they_are_served_and_guarded(self, rig: Rig):
        path = "/v1/endpoints/7:predict"
        assert rig.client.get("/alive").status_code == rig.client.get("/alive/").status_code == 200
        assert rig.post(path, instances=[native()]).status_code == 401
        key = {"authorization": "Bearer k"}
        good = rig.client.post(path, json={"instances": [native()]}, headers=key)
        assert good.json() == {"predictions": ["bcd"]}
        bad = rig.client.post(path, json={"instances": []}, headers=key).json()
        assert bad["error_type"] == "validation"

    def test_vertexs_choice_goes_before_ours(self):
        engine, backend = FakeEngine(), Backend()
        backend.ready(engine, ByteTokenizer(), engine.info_value)
        config = ServerConfig(predict_route="/generate", health_route="/v1/models")
        with TestClient(create_app(backend, config)) as client:
            assert client.post("/generate", json={"instances": [native()]}).json() == {"predictions": ["bcd"]}
            assert client.get("/v1/models").content == b""


INFER = "/v2/models/some/model/versions/1/infer"


def tensor(data: list[Any], name: str = "text", **rest: Any) -> dict[str, Any]:
    return {"name": name, "shape": [1, len(data)], "datatype": "BYTES", "data": data, **rest}


class TestKServe:
    def test_bytes_as_tgi_has_them(self, rig: Rig):
        body = {
            "id": "7", "parameters": {"max_new_tokens": 3}, "inputs": [tensor(list(b"a"))], "outputs": [{"name": "o"}]
        }  # fmt: skip
        answer = rig.post(INFER, **body).json()
        output = {"name": "o", "shape": [1, 3], "datatype": "BYTES", "data": list(b"bcd")}
        assert answer == {"id": "7", "model_name": "some/model", "outputs": [output]}

    def test_texts_as_the_protocol_has_them(self, rig: Rig):
        body = {"parameters": {"max_new_tokens": 3}, "inputs": [tensor(["a", "b"]), tensor(["x"], "more")]}
        answer = rig.post("/v2/models/m/infer", **body).json()
        assert [(o["name"], o["shape"], o["data"]) for o in answer["outputs"]] == [
            ("text", [2], ["bcd", "cde"]),
            ("more", [1], ["yza"]),
        ]

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"inputs": []}, "`inputs` cannot be empty"),
            ({"inputs": [tensor([])]}, "`inputs[0].data` must be texts"),
            ({"inputs": [tensor(["a", 1])]}, "`inputs[0].data` must be texts"),
            ({"inputs": [tensor([255])]}, "`inputs[0].data` must be UTF-8"),
            ({"inputs": [tensor([256])]}, "`inputs[0].data` must be UTF-8"),
            ({"inputs": [tensor([2**63])]}, "`inputs[0].data` must be UTF-8"),
            ({"inputs": [tensor([1], datatype="INT8")]}, "`inputs[0].datatype` must be BYTES"),
            ({"inputs": [tensor(["a"])], "outputs": []}, "`inputs` and `outputs` must have the same length"),
            ({"inputs": [tensor(["a", ""])]}, "instance 1: `inputs` cannot be empty"),
            ({"inputs": [tensor(["a"])], "parameters": {"details": True}}, "`details` are not possible here"),
            (
                {"inputs": [tensor(["a"])], "parameters": {"decoder_input_details": True}},
                "`details` are not possible",
            ),
        ],
    )
    def test_what_is_wrong_is_told(self, rig: Rig, body: dict[str, Any], message: str):
        response = rig.post(INFER, **body)
        assert response.status_code == 422
        assert response.json()["error"].startswith(f"Input validation error: {message}")

    def test_live_and_ready_tell_the_truth(self):
        backend = Backend()
        backend.say("loading weights 40 %")
        paths = ("/v2/health/ready", "/v2/models/m/ready", "/v2/models/org/m/versions/1/ready")
        with TestClient(create_app(backend, ServerConfig())) as client:
            assert client.get("/v2/health/live").json() == {"live": True}
            for path in paths:
                response = client.get(path)
                assert response.status_code == 503
                assert response.json() == {"live": True, "ready": False, "error": "loading weights 40 %"}
            assert client.get("/v2").json()["name"] == "xlane"
            engine = FakeEngine()
            backend.ready(engine, ByteTokenizer(), replace(engine.info_value, model_sha="abc"))
            for path in paths:
                assert client.get(path).json() == {"live": True, "ready": True}
            shown = client.get("/v2/models/org/m").json()
            assert shown == {"name": "org/m", "version": "abc", "extensions": ["infer", "ready"]}
            assert client.get("/v2/models/org/m/versions/3").json()["version"] == "3"
            engine.healthy = False
            assert client.get("/v2/health/ready").status_code == 503


def read(environ: dict[str, str], line: str = "serve") -> Settings:
    command, rest = choose(line.split())
    return settle(command, rest, environ, flags.TGI_DEFAULTS)


def test_sagemakers_variables():
    environ = {
        "HF_MODEL_ID": "o/m",
        "HF_MODEL_REVISION": "r",
        "SM_NUM_GPUS": "4",
        "HF_MODEL_TRUST_REMOTE_CODE": "true",
    }
    settings = read({**environ, "MODEL_ID": "/preset", "PORT": "80", "SAGEMAKER_BIND_TO_PORT": "8080"})
    engine = settings.engine
    assert (engine.model_id, engine.revision, engine.model_parallel) == ("o/m", "r", 4)
    assert settings.server.port == 8080
    assert "HF_MODEL_TRUST_REMOTE_CODE has no meaning here" in settings.options.notes[0]
    assert read({"SM_NUM_GPUS": "0"}).engine.model_parallel is None
    with pytest.raises(UsageError, match="HF_MODEL_QUANTIZE=exl2 is not supported"):
        read({"HF_MODEL_QUANTIZE": "exl2"})


def test_vertexs_variables():
    environ = {"AIP_HTTP_PORT": "8081", "PORT": "80", "AIP_PREDICT_ROUTE": "/p", "AIP_HEALTH_ROUTE": "/h"}
    server = read(environ).server
    assert (server.host, server.port, server.predict_route, server.health_route) == (
        "0.0.0.0",
        8081,
        "/p",
        "/h",
    )
    assert read(environ, "serve --port 9").server.port == 9
    with pytest.raises(UsageError, match="AIP_PREDICT_ROUTE=p: expected a value that starts with /"):
        read({"AIP_PREDICT_ROUTE": "p"})
