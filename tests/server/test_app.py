"""Everything around a generation: readiness, keys, sizes, shapes of errors, permits, metrics, other routes."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from xlane.engine import RequestFailed
from xlane.server import front
from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.errors import Busy
from xlane.server.middleware import AnswerFailures, BodyLimit

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine
from .conftest import Rig

GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a"}),
    ("/generate_stream", {"inputs": "a"}),
    ("/", {"inputs": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/responses", {"input": "a"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
    ("/invocations", {"inputs": "a"}),
    ("/detokenize", {"tokens": [97]}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}),
    ("/tokenize", {"inputs": "a"}),
    ("/chat_tokenize", {"messages": [{"role": "user", "content": "a"}]}),
]


def message_of(response: httpx.Response) -> str:
    """The error text, whichever shape it has to have at this path."""
    error = response.json()["error"]
    if response.request.url.path.startswith("/v1/messages"):
        assert set(error) == {"type", "message"}
        return error["message"]
    openai = response.request.url.path.startswith(("/v1", "/models"))
    assert isinstance(error, dict) == openai
    assert set(error if openai else response.json()) == (
        {"message", "type", "param", "code"} if openai else {"error", "error_type"}
    )
    return error["message"] if openai else error


def test_the_app_answers_before_there_is_an_engine():
    backend = Backend()
    with TestClient(create_app(backend, ServerConfig())) as client:
        backend.say("loading weights 40 %")
        for path in ("/health", "/ping", "/v1/health", "/"):
            response = client.get(path)
            assert response.status_code == 503
            assert response.json() == {"error": "loading weights 40 %", "error_type": "healthcheck"}
        for path, body in GENERATIONS:
            response = client.post(path, json=body)
            assert response.status_code == 503, path
            assert response.headers["retry-after"] == "1"
            assert "loading weights 40 %" in message_of(response)
        assert client.get("/info").status_code == 503
        assert client.get("/v1/models").status_code == 503
        assert client.get("/metrics").status_code == 200
        engine = FakeEngine()
        backend.ready(engine, ByteTokenizer(), engine.info_value)
        assert client.get("/health").status_code == 200
        assert client.get("/health").content == b""
        backend.down("restarting the engine")
        assert client.get("/health").json()["error"] == "restarting the engine"
        backend.ready(engine, ByteTokenizer(), engine.info_value)
        backend.drain()
        assert client.get("/health").json()["error"] == "shutting down"
        assert client.post("/generate", json={"inputs": "a"}).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_request_that_is_being_checked_when_the_server_is_to_stop_is_answered(path: str, stream: bool):
    engine, backend = FakeEngine(), Backend()

    class Stopping(ByteTokenizer):
        def apply_chat(self, *args: Any, **kwargs: Any) -> str:
            backend.drain()
            return super().apply_chat(*args, **kwargs)

    backend.ready(engine, Stopping(), engine.info_value)
    body = {"messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 1, "stream": stream}
    with TestClient(create_app(backend, ServerConfig())) as client:
        assert client.post(path, json=body).status_code == 200
        assert client.post(path, json=body).status_code == 503


def test_an_engine_that_is_not_well(rig: Rig):
    rig.engine.healthy = False
    response = rig.client.get("/health")
    assert (response.status_code, response.json()["error"]) == (503, "unhealthy")


class TestKey:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(api_key="Sécret")

    @pytest.mark.parametrize(("path", "body"), GENERATIONS)
    def test_every_post_needs_it(self, rig: Rig, path: str, body: dict[str, Any]):
        key = "Sécret".encode()
        for wrong in ({}, {"authorization": b"Bearer secret"}, {"authorization": b"Basic " + key}):
            response = rig.client.post(path, json=body, headers=wrong)
            assert response.status_code == 401
            assert message_of(response).startswith("A valid key is required")
            assert response.headers["www-authenticate"] == "Bearer"
        spelled = path if path == "/" else f"{path}//"
        ok = rig.client.post(spelled, json=body, headers={"authorization": b"bearer " + key})
        assert ok.status_code == 200

    @pytest.mark.parametrize("path", ["/", "/health", "/ping", "/info", "/metrics", "/v1/models"])
    def test_reading_does_not(self, rig: Rig, path: str):
        assert rig.client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("content", "media", "native", "openai"),
    [
        (b"{", "application/json", 400, 400),
        (b"", "application/json", 400, 400),
        (b"\xff\xfe", "application/json", 400, 400),
        (b'{"inputs": "\\ud800", "messages": "\\ud800"}', "application/json", 400, 400),
        (b'{"inputs": NaN, "messages": NaN}', "application/json", 400, 400),
        (b'{"x":' * 50_000, "application/json", 400, 400),
        (b"[]", "application/json", 422, 400),
        (b"{}", "application/json", 422, 400),
        (b'{"inputs": 5, "messages": 5}', "application/json", 422, 400),
        (b'{"inputs": "a"}', "text/plain", 415, 415),
        (b'{"inputs": "a"}', None, 415, 415),
    ],
)
def test_bodies_that_are_none(
    rig: Rig, path: str, content: bytes, media: str | None, native: int, openai: int
):
    headers = {} if media is None else {"content-type": media}
    response = rig.client.post(path, content=content, headers=headers)
    assert response.status_code == (openai if path.startswith("/v1") else native)
    assert len(message_of(response)) < 500


def test_content_types_that_are_json(rig: Rig):
    for media in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        response = rig.client.post("/generate", content=b'{"inputs":"a"}', headers={"content-type": media})
        assert response.status_code == 200


class TestBodyLimit:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(payload_limit=1000)

    @pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
    def test_declared_and_undeclared(self, rig: Rig, path: str):
        body = b'{"inputs": "a", "prompt": "%s"}' % (b"a" * 1000)

        def parts():
            yield body[:600]
            yield body[600:]

        for content in (body, parts()):
            response = rig.client.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413
            assert message_of(response) == "The request body is larger than 1000 bytes"


def test_bodies_together_are_bounded_and_one_alone_is_not():
    """One is held until its answer; beside it there is room for what fits, and afterwards for all."""
    answered = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/first":
            await answered.wait()

    limited = BodyLimit(app, limit=900, together=500)

    async def ask(path: str, *sizes: int) -> None:
        parts = [{"type": "http.request", "body": b" " * size, "more_body": True} for size in sizes]
        messages = iter([*parts, {"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Message:
            return next(messages)

        async def send(message: Message) -> None: ...

        await limited({"type": "http", "path": path, "headers": []}, receive, send)

    async def main() -> None:
        await ask("/alone", 300, 500)
        first = asyncio.create_task(ask("/first", 400))
        await asyncio.sleep(0)
        for _ in range(3):
            await ask("/fits", 50, 50)
            with pytest.raises(Busy, match="--limit bodies_limit="):
                await ask("/does-not", 50, 51)
        answered.set()
        await first
        await ask("/alone", 800)

    asyncio.run(main())


def test_unknown_routes_and_methods(rig: Rig):
    for path in ("/nothing", "/v1/nothing", "/v1/chat"):
        response = rig.client.get(path)
        assert response.status_code == 404
        message_of(response)
    for path in ("/generate", "/v1/chat/completions"):
        response = rig.client.get(path)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        message_of(response)


def test_request_ids(rig: Rig):
    assert rig.client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "a\tb", "x" * 200):
        given = rig.client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert given != bad
        assert len(given) == 24
    assert len(rig.client.post("/generate").headers["x-request-id"]) == 24


class TestFailures:
    """Of a route, by an error that nobody foresaw."""

    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(cors_allow_origins=("*",))

    @pytest.fixture(autouse=True)
    def failing(self, rig: Rig) -> None:
        rig.engine.fail_with, rig.engine.fail_after = ValueError("secret"), 0

    @pytest.mark.parametrize(("path", "body"), GENERATIONS[:8])
    def test_are_answered_as_all_is_and_logged(
        self, rig: Rig, path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
    ):
        headers = {"x-request-id": "abc-1", "origin": "https://chat.example"}
        answer = rig.client.post(path, json=body, headers=headers)
        assert (answer.status_code, message_of(answer)) == (500, "Internal server error")
        assert answer.headers["x-request-id"] == "abc-1"
        assert answer.headers["access-control-allow-origin"] == "*"
        [logged] = caplog.records
        assert logged.getMessage() == f"POST {path!r} failed, request abc-1"
        assert "ValueError: secret" in caplog.text

    @pytest.mark.parametrize(("error", "times"), [(ValueError("secret"), 1), (RequestFailed("NaN"), 0)])
    def test_of_a_stream_are_logged_too(
        self, rig: Rig, error: Exception, times: int, caplog: pytest.LogCaptureFixture
    ):
        rig.engine.fail_with, rig.engine.fail_after = error, 2
        path, body = GENERATIONS[4]
        answer = rig.client.post(path, json=body, headers={"x-request-id": "abc-1"})
        assert '"error":{' in answer.text
        assert [log.getMessage() for log in caplog.records] == [
            f"POST {path!r} failed, request abc-1"
        ] * times

    def test_behind_the_first_byte_break_off(self):
        sent: list[Message] = []
        start = {"type": "http.response.start", "status": 200, "headers": []}

        async def half(scope: Scope, receive: Receive, send: Send) -> None:
            await send(start)
            raise ValueError("secret")

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            sent.append(message)

        with pytest.raises(ValueError, match="secret"):
            asyncio.run(AnswerFailures(half)({"type": "http", "path": "/"}, receive, send))
        assert sent == [start]


class TestCors:
    def test_off_by_default(self, rig: Rig):
        response = rig.client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers

    @pytest.mark.parametrize("allowed", ["https://chat.example", "*"])
    @pytest.mark.parametrize(
        "sent",
        [
            "authorization,content-type",
            "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout",
            "anthropic-beta,anthropic-dangerous-direct-browser-access,anthropic-version,content-type,x-api-key",
        ],
        ids=["fetch", "openai-node", "anthropic-sdk-typescript"],
    )
    def test_on(self, allowed: str, sent: str):
        config = ServerConfig(cors_allow_origins=(allowed,), api_key="k")
        origin = {"origin": "https://chat.example"}
        asks = {"access-control-request-method": "POST", "access-control-request-headers": sent}
        with TestClient(create_app(Backend(), config)) as client:
            response = client.options("/v1/chat/completions", headers={**origin, **asks})
            assert (response.status_code, response.headers["access-control-allow-headers"]) == (200, sent)
            refused = client.post("/generate", headers=origin)
            assert refused.status_code == 401
            for answer in (response, refused):
                assert answer.headers["access-control-allow-origin"] == allowed
                assert "access-control-allow-credentials" not in answer.headers
            assert refused.headers["access-control-expose-headers"] == "*"

    def test_strangers_are_refused(self):
        config = ServerConfig(cors_allow_origins=("https://chat.example",))
        asks = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        with TestClient(create_app(Backend(), config)) as client:
            for answer in (client.options("/generate", headers=asks), client.post("/generate", headers=asks)):
                assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("path", "body"), GENERATIONS[:8])
def test_beyond_the_permits_the_answer_is_429_at_once(path: str, body: dict[str, Any]):
    async def main() -> None:
        engine, backend = FakeEngine(first_delay_s=0.3), Backend()
        backend.ready(engine, ByteTokenizer(), engine.info_value)
        app = create_app(backend, ServerConfig(max_concurrent_requests=2))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            running = [asyncio.create_task(client.post("/generate", json={"inputs": "a"})) for _ in range(2)]
            await asyncio.sleep(0.1)
            response = await client.post(path, json=body)
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert message_of(response) == "Model is overloaded"
            assert [r.status_code for r in await asyncio.gather(*running)] == [200, 200]
            assert (await client.post(path, json=body)).status_code == 200
        assert app.state.front.permits.taken == 0

    asyncio.run(main())


def test_the_advice_when_to_come_again_is_how_long_permits_were_held(monkeypatch: pytest.MonkeyPatch):
    now_s = [100.0]
    monkeypatch.setattr(front, "monotonic", lambda: now_s[0])
    permits = front.Permits(1)

    def hold(seconds: float) -> None:
        with permits.take(1):
            now_s[0] += seconds
            with pytest.raises(Busy) as refused, permits.take(1):
                pass
            advice.append(refused.value.retry_after_s)

    advice: list[float] = []
    for seconds in (2.0, 4.0, 30.0):
        hold(seconds)
    with pytest.raises(ValueError, match="refused"), permits.take(1):
        raise ValueError("refused at once, which says nothing of the load")
    hold(1.0)
    assert advice == [1.0, 2.0, 3.0, 12.0]
    assert permits.taken == 0


class TestFewPermits:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(max_concurrent_requests=4, max_best_of=9)

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("/generate", {"inputs": "a", "parameters": {"best_of": 5, "do_sample": True}}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 5}),
            ("/v1/completions", {"prompt": "a", "best_of": 5}),
            ("/v1/completions", {"prompt": "a", "n": 5, "stream": True}),
            ("/v1/completions", {"prompt": ["a"] * 3, "n": 2}),
            ("/vertex", {"instances": [{"inputs": "a"}] * 5}),
        ],
    )
    def test_a_request_that_needs_more_will_never_be_served(self, rig: Rig, path: str, fields: Any):
        answer = rig.post(path, **fields)
        assert answer.status_code == (400 if path.startswith("/v1") else 422)
        assert "at most 4 can be in flight (--max-concurrent-requests)" in message_of(answer)
        assert "retry-after" not in answer.headers
        assert rig.chat(n=4, temperature=1).status_code == 200

    @pytest.mark.parametrize("n", [-1, 0, 17])
    def test_a_number_that_is_none_is_told_as_such(self, rig: Rig, n: int):
        answer = rig.chat(n=n)
        assert message_of(answer) == f"`n` must be between 1 and 16. Given: {n}"


@pytest.mark.parametrize("prompts", [3, 4])
def test_more_prompts_than_the_engine_has_room_for_will_never_be_served(rig: Rig, prompts: int):
    few = replace(rig.engine.info_value, lanes=2, max_queued=1)
    rig.backend.ready(rig.engine, ByteTokenizer(), few)
    answer = rig.post("/v1/completions", prompt=["a"] * prompts, max_tokens=1)
    assert answer.status_code == (200 if prompts == 3 else 400)
    assert prompts == 3 or "at most 3 have room in the engine" in message_of(answer)


def test_info(rig: Rig):
    info = rig.client.get("/info").json()
    assert info["model_id"] == "fake/alphabet"
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (400, 512)
    assert info["router"] == "text-generation-router"
    assert (info["model_dtype"], info["model_device_type"]) == ("float32", "cpu")
    assert (info["model_device_kind"], info["model_device_count"], info["programs"]) == ("fake", 1, 0)
    assert set(info) >= {
        "model_sha", "model_pipeline_tag", "max_concurrent_requests", "max_best_of", "max_stop_sequences",
        "validation_workers", "max_client_batch_size", "version", "sha", "docker_label",
    }  # fmt: skip


def samples(rig: Rig) -> dict[str, float]:
    lines = rig.client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


def test_metrics(rig: Rig):
    rig.generate(max_new_tokens=3)
    rig.chat(max_tokens=3, stream=True, n=2)
    rig.generate(temperature=0)
    found = samples(rig)
    assert found["tgi_request_count"] == 3
    assert found["tgi_request_success"] == 2
    assert found['tgi_request_failure{err="validation"}'] == 1
    assert found["tgi_request_generated_tokens_count"] == 3
    assert found["tgi_request_generated_tokens_sum"] == 9
    assert found["tgi_request_input_length_sum"] == 2 + 19
    assert found["tgi_request_duration_count"] == 2
    assert found["tgi_request_queue_duration_sum"] == pytest.approx(3 * 0.001)
    assert found["tgi_request_inference_duration_sum"] == pytest.approx(3 * 0.002)
    assert found["xlane_ttft_seconds_count"] == 3
    assert found["xlane_inter_token_seconds_count"] == 6
    assert (found["tgi_queue_size"], found["tgi_batch_current_size"]) == (0, 0)
    assert (found["xlane_pages_free"], found["xlane_pages_total"]) == (60, 64)
    assert found["xlane_compiles_after_ready_total"] == 0
    assert found['tgi_batch_inference_count{method="decode"}'] == 7


def test_metrics_are_typed_under_their_own_names(rig: Rig):
    response = rig.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in (
        "# TYPE tgi_request_count counter",
        "# TYPE tgi_request_duration histogram",
        "# TYPE tgi_queue_size gauge",
        "# TYPE xlane_compiles_after_ready_total counter",
    ):
        assert line in response.text.splitlines()
    buckets = [line for line in response.text.splitlines() if line.startswith("tgi_request_duration_bucket")]
    assert len(buckets) == 36


def test_the_served_name_is_shown_and_accepted():
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    config = replace(ServerConfig(), served_model_name="alphabet")
    with TestClient(create_app(backend, config)) as client:
        body = {"prompt": "a", "max_tokens": 1}
        for model in ("alphabet", "fake/alphabet"):
            assert client.post("/v1/completions", json={**body, "model": model}).json()["model"] == "alphabet"
        assert client.get("/v1/models").json()["data"][0]["id"] == "alphabet"
