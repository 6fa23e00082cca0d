"""Traces, received by a real OTLP collector on this machine; and what is said when the packages are missing."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from starlette.testclient import TestClient

from xlane.engine import RequestFailed
from xlane.server import flags, tracing
from xlane.server.app import create_app
from xlane.server.backend import Backend
from xlane.server.cli import choose, settle
from xlane.server.config import ServerConfig
from xlane.server.options import UsageError
from xlane.server.tracing import Tracing, _human

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Collector(service.TraceServiceServicer):
    """Keeps what it is sent."""

    address: str = ""
    received: list[Any] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:
        self.received += request.resource_spans
        return messages.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        return [span for group in self.received for scope in group.scope_spans for span in scope.spans]

    def named(self, name: str) -> Span:
        [span] = [span for span in self.spans if span.name == name]
        return span


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = grpc.server(ThreadPoolExecutor(1))
    collector = Collector()
    service.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield collector
    server.stop(0).wait()


@pytest.fixture
def config(collector: Collector) -> ServerConfig:
    return ServerConfig(otlp_endpoint=f"http://{collector.address}", otlp_service_name="mine")


def attributes(span: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def run(
    collector: Collector, config: ServerConfig, *calls: tuple[str, dict[str, Any]], **engine: Any
) -> list[Any]:
    """Answers to some calls, made of a server that has then ended."""
    fake, backend = FakeEngine(**engine), Backend()
    backend.ready(fake, ByteTokenizer(), fake.info_value)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r1"}
    with TestClient(create_app(backend, config), raise_server_exceptions=False) as client:
        return [client.post(path, json=body, headers=headers) for path, body in calls]


CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "temperature": 0.5, "seed": 7}


def test_a_chat_is_told_with_its_parent_and_its_numbers(collector: Collector, config: ServerConfig):
    run(collector, config, ("/v1/chat/completions", CHAT))
    outer, inner = collector.named("POST /v1/chat/completions"), collector.named("chat fake/alphabet")
    assert outer.trace_id.hex() == inner.trace_id.hex() == TRACE
    assert outer.parent_span_id.hex() == PARENT
    assert inner.parent_span_id == outer.span_id
    assert outer.kind == Span.SPAN_KIND_SERVER
    assert attributes(outer) == {
        "http.request.method": "POST", "url.path": "/v1/chat/completions", "http.response.status_code": 200,
        "http.response.header.x-request-id": ["r1"],
    }  # fmt: skip
    told = attributes(inner)
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "xlane", "gen_ai.request.model": "fake/alphabet",
        "gen_ai.response.model": "fake/alphabet", "gen_ai.request.max_tokens": 3, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0, "gen_ai.request.seed": 7, "gen_ai.usage.input_tokens": 19,
        "gen_ai.usage.output_tokens": 3, "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ["length"], "seed": "7", "queue_time": "1ms", "inference_time": "2ms",
        "time_per_token": "666.667µs",
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    assert {"parameters", "total_time", "validation_time"} <= set(told)
    assert "prompt" not in "".join(told)
    queued, infer = collector.named("queued"), collector.named("infer")
    assert queued.parent_span_id == infer.parent_span_id == inner.span_id
    assert queued.end_time_unix_nano - queued.start_time_unix_nano == 1_000_000
    assert infer.end_time_unix_nano - infer.start_time_unix_nano == 2_000_000
    assert [event.name for event in infer.events] == ["first_token"]
    resource = attributes(collector.received[0].resource)
    assert resource["service.name"] == "mine"


def test_what_a_stop_string_ended_has_its_stages(collector: Collector, config: ServerConfig):
    run(collector, config, ("/v1/completions", {"prompt": "a", "temperature": 0, "stop": "d"}), delay_s=0.01)
    queued, infer = collector.named("queued"), collector.named("infer")
    assert queued.end_time_unix_nano - queued.start_time_unix_nano == 1_000_000
    assert infer.end_time_unix_nano - infer.start_time_unix_nano > 10_000_000
    assert attributes(collector.named("text_completion fake/alphabet"))["queue_time"] == "1ms"


def test_every_sequence_has_a_span(collector: Collector, config: ServerConfig):
    calls = (
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "stream": True}),
        ("/generate", {"inputs": "a", "parameters": {"seed": 2**64 - 1, "do_sample": True}}),
    )
    assert [answer.status_code for answer in run(collector, config, *calls)] == [200, 200]
    spans = [span for span in collector.spans if span.name == "text_completion fake/alphabet"]
    assert len(spans) == 5
    told = attributes(next(s for s in spans if s.parent_span_id == collector.named("POST /generate").span_id))
    assert told["seed"] == str(2**64 - 1)
    assert "gen_ai.request.seed" not in told


def test_a_collector_that_is_down_fails_no_request(collector: Collector, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "EXPORT_TIMEOUT_S", 1)
    answers = run(
        collector, ServerConfig(otlp_endpoint="http://127.0.0.1:9"), *[("/v1/chat/completions", CHAT)] * 20
    )
    assert [answer.status_code for answer in answers] == [200] * 20


def test_failures_are_told(collector: Collector, config: ServerConfig):
    calls = (("/v1/chat/completions", CHAT), ("/generate", {"inputs": ""}))
    answers = run(collector, config, *calls, fail_with=RequestFailed("the row went wrong"), fail_after=0)
    assert [answer.status_code for answer in answers] == [500, 422]
    inner = collector.named("chat fake/alphabet")
    assert inner.status.message == "the row went wrong"
    assert attributes(inner)["error.type"] == "RequestFailed"
    assert collector.named("POST /v1/chat/completions").status.code == 2
    refused = collector.named("POST /generate")
    assert (attributes(refused)["http.response.status_code"], refused.status.code) == (422, 0)


def test_without_a_parent_a_trace_begins_here_and_probes_are_not_traced(
    collector: Collector, config: ServerConfig
):
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with TestClient(create_app(backend, config)) as client:
        for path in ("/health", "/metrics", "/info"):
            assert client.get(path).status_code == 200
        client.post("/tokenize", json={"inputs": "a"}, headers={"traceparent": "nonsense"})
    [span] = collector.spans
    assert (span.name, span.parent_span_id) == ("POST /tokenize", b"")


def test_a_parent_that_is_not_sampled_is_not_traced(collector: Collector, config: ServerConfig):
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with TestClient(create_app(backend, config)) as client:
        client.post("/tokenize", json={"inputs": "a"}, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert collector.spans == []


def test_nothing_is_imported_unless_it_is_asked_for():
    code = (
        "import sys; from xlane.server.app import create_app; from xlane.server.backend import Backend\n"
        "from xlane.server.config import ServerConfig; create_app(Backend(), ServerConfig())\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_missing_extra_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UsageError, match=r"--otlp-endpoint needs .*: pip install 'xlane\[otel\]'"):
        Tracing("127.0.0.1:4317", "x")


def test_the_flags():
    command, rest = choose(["serve", "--otlp-endpoint", "http://c:4317"])
    server = settle(command, rest, {}, {}).server
    assert (server.otlp_endpoint, server.otlp_service_name) == ("http://c:4317", "xlane")
    assert (
        settle(command, rest, {}, flags.TGI_DEFAULTS).server.otlp_service_name
        == "text-generation-inference.router"
    )
    assert settle(command, [], {"OTLP_ENDPOINT": "c:1"}, {}).server.otlp_endpoint == "c:1"


def test_durations_are_written_as_tgi_writes_them():
    assert [_human(s) for s in (1.5, 0.0123, 45e-6, 3e-9)] == ["1.5s", "12.3ms", "45µs", "3ns"]
