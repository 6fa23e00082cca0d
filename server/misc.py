"""The routes that only tell: information, health, metrics. Knows their JSON."""

import asyncio

import orjson
from prometheus_client.core import Metric
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine import EngineError, EngineStats
from ..engine.replay import ReplayingClient
from .backend import Serving
from .front import Front, front_of
from .metrics import CONTENT_TYPE, Now, by_model, certificate_family, text_of
from .models import Models
from .tls import Certificate

PROBE_TIMEOUT_S = 5.0
"""Longest an engine may take to say how it is before it counts as not well."""


async def info(request: HttpRequest) -> Response:
    """`GET /info`."""
    front = front_of(request)
    engine, config = front.backend.info, front.config
    return _json(
        {
            "model_id": engine.model_id,
            "model_sha": engine.model_sha,
            "model_pipeline_tag": "text-generation",
            "model_dtype": engine.dtype,
            "model_device_type": engine.platform,
            "model_device_kind": engine.device_kind,
            "model_device_count": engine.device_count,
            "programs": len(engine.programs),
            "max_concurrent_requests": config.max_concurrent_requests,
            "max_best_of": config.max_best_of,
            "max_stop_sequences": config.max_stop_sequences,
            "max_input_tokens": engine.max_input_tokens,
            "max_total_tokens": engine.max_total_tokens,
            "max_batch_total_tokens": engine.pages * engine.page_tokens,
            "max_batch_size": engine.lanes,
            "speculate": engine.speculate,
            "validation_workers": config.validation_workers,
            "max_client_batch_size": config.max_client_batch_size,
            "router": "text-generation-router",
            "version": engine.version,
            "sha": None,
            "docker_label": None,
        }
    )


async def health(request: HttpRequest) -> Response:
    """`GET /health`, `/ping`, `/v1/health`, `/`: 200 and empty when requests are served, or 503 and why not."""
    reason = await why_unhealthy(request)
    if reason is None:
        return Response(status_code=200)
    body = orjson.dumps({"error": reason, "error_type": "healthcheck"})
    return Response(body, 503, {"retry-after": "1"}, "application/json")


async def why_unhealthy(request: HttpRequest) -> str | None:
    """Why generations are not served now, or None if they are. One of several models may be away: it is loaded when it is
    asked for, unless that is known to fail."""
    first = front_of(request).backend
    if first.reason is not None and not first.comes_back:
        return first.reason
    models: Models | None = request.app.state.models
    if models is not None and models.failure:
        return models.failure
    fronts: dict[str, Front] = request.app.state.fronts
    there = [front.backend.serving() for front in fronts.values() if front.backend.reason is None]
    return None if all([await _well(serving) for serving in there]) else "unhealthy"


async def metrics(request: HttpRequest) -> Response:
    """`GET /metrics`. Also answers while there is no engine, with the front's own numbers. Those of several models have its
    name as the label `model`."""
    fronts: dict[str, Front] = request.app.state.fronts
    families = {name: await _families(front) for name, front in fronts.items()}
    told = by_model(families) if len(families) > 1 else next(iter(families.values()))
    certificate: Certificate | None = request.app.state.certificate
    if certificate is not None:
        told = [*told, certificate_family(certificate.left_s)]
    return Response(text_of(told), headers={"content-type": CONTENT_TYPE})


async def _families(front: Front) -> list[Metric]:
    serving = front.backend.latest
    stats = None if serving is None else await _stats(serving)
    now = _now(front, answering=stats is not None)
    return front.metrics.families(stats, None if serving is None else serving.info, now)


def _now(front: Front, *, answering: bool) -> Now:
    backend = front.backend
    engine = None if backend.latest is None else backend.latest.engine
    replays = engine.replays if isinstance(engine, ReplayingClient) else 0
    ready, accounts = answering and backend.reason is None, tuple(front.keys.accounts.values())
    return Now(ready, front.permits.taken, backend.restarts, replays, accounts, backend.engines)


async def _well(serving: Serving) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return await serving.engine.health()
    except (TimeoutError, EngineError):
        return False


async def _stats(serving: Serving) -> EngineStats | None:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return await serving.engine.stats()
    except (TimeoutError, EngineError):
        return None


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
