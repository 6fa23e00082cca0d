"""OpenTelemetry: a span per POST, below it one per sequence with what GenAI's conventions and TGI call its numbers.

The packages are imported when tracing is switched on, not before. A client's `traceparent` becomes the parent. Knows
ASGI and what `watch.py` tells; no bodies, no routes.
"""

import time
from importlib import metadata
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Request, Timing
from .entry import ENTERED
from .options import UsageError
from .watch import WATCH

EXPORT_TIMEOUT_S = 5
"""Longest one export, and so the end of the server, waits for the collector."""
_MAX_INT = 2**63 - 1
_CHATS = ("chat", "messages", "responses")


class Tracing:
    """A connection to a collector. Spans are sent in batches by a thread of its own."""

    def __init__(self, endpoint: str, service_name: str) -> None:
        """Raises UsageError if the packages are not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise UsageError(
                f"--otlp-endpoint needs packages that are not installed ({error.name}): pip install 'xlane[otel]'"
            ) from error
        version = metadata.version("xlane")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service_name, "service.version": version}),
            shutdown_on_exit=False,
        )
        # TGI takes addresses without a scheme too; like http:// they mean no TLS.
        address = endpoint if "://" in endpoint else f"http://{endpoint}"
        exporter = OTLPSpanExporter(endpoint=address, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("xlane", version)
        self._propagator = TraceContextTextMapPropagator()

    def request(self, scope: Scope) -> "RequestTrace":
        """Begin the span of an HTTP request."""
        parent = self._propagator.extract(Headers(scope=scope))
        return RequestTrace(self._tracer, parent, scope)

    def close(self) -> None:
        """Send what is left. Blocks."""
        self._provider.shutdown()


class RequestTrace:
    """The spans of one HTTP request."""

    def __init__(self, tracer: Any, parent: Any, scope: Scope) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._tracer = tracer
        self._scope = scope
        self._arrived_ns, self._arrived = time.time_ns(), time.monotonic_ns()
        self._path: str = scope["path"]
        attributes = {"http.request.method": scope["method"], "url.path": self._path}
        self._span = tracer.start_span(
            f"{scope['method']} {self._path}",
            parent,
            SpanKind.SERVER,
            attributes,
            start_time=self._arrived_ns,
        )
        self._context = set_span_in_context(self._span, parent)
        self._open: dict[str, tuple[Any, int]] = {}

    def _now_ns(self) -> int:
        """By the clock of its arrival, whatever was done to that since."""
        return self._arrived_ns + time.monotonic_ns() - self._arrived

    def started(self, request: Request) -> None:
        """See `Watch`."""
        now = self._now_ns()
        model = self._model()
        operation = "chat" if any(word in self._path for word in _CHATS) else "text_completion"
        span = self._tracer.start_span(f"{operation} {model}".rstrip(), self._context, start_time=now)
        span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "xlane",
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                **_asked(request),
                "validation_time": _human((now - self._arrived_ns) / 1e9),
            }
        )
        self._open[request.id] = (span, now)

    def ended(
        self, request: Request, reason: str, tokens: int, cached_tokens: int, timing: Timing | None
    ) -> None:
        """See `Watch`."""
        span, began = self._open.pop(request.id)
        span.set_attributes(
            {
                "gen_ai.response.id": request.id,
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.usage.output_tokens": tokens,
                "gen_ai.usage.cache_read.input_tokens": cached_tokens,
                "total_time": _human((self._now_ns() - self._arrived_ns) / 1e9),
            }
        )
        if timing is not None:
            self._stages(span, began, tokens, timing)
        span.end()

    def failed(self, request: Request, error: Exception) -> None:
        """See `Watch`."""
        from opentelemetry.trace import StatusCode

        if request.id in self._open:
            span, _ = self._open.pop(request.id)
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR, str(error)[:1000])
            span.end()

    def answered(self, status: int, request_id: str | None) -> None:
        """The answer's first line."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.response.status_code", status)
        if request_id is not None:
            self._span.set_attribute("http.response.header.x-request-id", [request_id])
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """The answer is sent, or nobody wants it any more."""
        for span, _ in self._open.values():
            span.set_attribute("error.type", "cancelled")
            span.end()
        self._open.clear()
        self._span.end()

    def _stages(self, span: Any, began: int, tokens: int, timing: Timing) -> None:
        """The time before and in a lane, under TGI's names."""
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(span, self._context)
        queued, first, total = (
            began + int(1e9 * s) for s in (timing.queue_s, timing.first_token_s, timing.total_s)
        )
        self._tracer.start_span("queued", context, start_time=began).end(queued)
        infer = self._tracer.start_span("infer", context, start_time=queued)
        infer.add_event("first_token", timestamp=first)
        infer.end(total)
        inference_s = max(0.0, timing.total_s - timing.queue_s)
        span.set_attributes(
            {
                "queue_time": _human(timing.queue_s),
                "inference_time": _human(inference_s),
                "time_per_token": _human(inference_s / max(1, tokens)),
                "gen_ai.server.time_to_first_token": timing.first_token_s,
            }
        )

    def _model(self) -> str:
        front = self._scope["app"].state.front
        if entered := self._scope.get(ENTERED):
            return entered[0].name
        serving = front.backend.latest
        return front.config.served_model_name or ("" if serving is None else serving.info.model_id)


class TraceRequests:
    """Middleware that gives every POST its span; GET routes do no work worth one."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        trace = self._tracing.request(scope)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.answered(message["status"], Headers(raw=message["headers"]).get("x-request-id"))
            await send(message)

        token = WATCH.set(trace)
        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            trace.answered(500, None)
            raise
        finally:
            WATCH.reset(token)
            trace.end()


def _asked(request: Request) -> dict[str, Any]:
    """What the engine was asked for, in the words of GenAI's conventions, and TGI's `parameters` and `seed`."""
    sampling = request.sampling
    asked: dict[str, Any] = {
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "parameters": str(sampling),
    }
    if sampling.top_k:
        asked["gen_ai.request.top_k"] = sampling.top_k
    if sampling.temperature > 0.0:
        asked["seed"] = str(sampling.seed)
        if sampling.seed <= _MAX_INT:  # OpenTelemetry has no larger numbers.
            asked["gen_ai.request.seed"] = sampling.seed
    return asked


def _human(seconds: float) -> str:
    """A duration as TGI writes it: 1.5s, 12.3ms, 45µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.6g}{unit}"
    return f"{seconds / 1e-9:.6g}ns"
