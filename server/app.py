"""The ASGI app: routes, middleware, error handlers, put together once. Everything it needs is handed in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from ..engine import EngineError
from . import adapters, anthropic, docs, kserve, misc, native, sagemaker, tokens, vertex
from .auth import RequireKey
from .backend import Backend
from .config import ServerConfig
from .entry import ReleaseModels
from .errors import ServerError, error_response
from .front import Front, front_beside, make_front
from .keys import Keys
from .middleware import AnswerFailures, BodyLimit, RequestIds, TidyPaths
from .models import Models
from .openai_chat import chat_completions
from .openai_completions import completions
from .openai_models import list_models, show_model
from .responses import responses
from .stream import ClientGone
from .tls import Certificate
from .tracing import TraceRequests, Tracing
from .ui import routes as ui


def create_app(
    backend: Backend,
    config: ServerConfig,
    models: Models | None = None,
    certificate: Certificate | None = None,
) -> Starlette:
    """The app. It can be started before the backend is ready, and then says so. Raises UsageError.

    Of several models, `backend` is the first one's. `certificate` is what HTTPS is served with, for /metrics.
    """
    front = make_front(backend, config)
    tracing = Tracing(config.otlp_endpoint, config.otlp_service_name) if config.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        front.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = Starlette(
        routes=routes(config),
        middleware=_middleware(config, front.keys, tracing, models),
        exception_handlers={
            HTTPException: _on_error,
            ServerError: _on_error,
            EngineError: _on_error,
            ClientGone: _on_client_gone,
            Exception: _on_error,
        },
        lifespan=lifespan,
    )
    # TidyPaths has made one path of all spellings; a redirect would lose the body of a POST with some clients.
    app.router.redirect_slashes = False
    app.state.front = front
    app.state.models = models
    app.state.certificate = certificate
    app.state.fronts = _fronts(front, models)
    return app


def _fronts(front: Front, models: Models | None) -> dict[str, Front]:
    """The front of each model, by name. One that is alone has its name from its engine, and none yet."""
    if models is None:
        return {"": front}
    return {
        name: front if model.backend is front.backend else front_beside(front, name, model.backend)
        for name, model in models.all.items()
    }


def routes(config: ServerConfig) -> list[Route]:
    """Every route. What each takes and answers, for people and generators of clients, is told in operations.py."""
    return [
        *_chosen(config),
        Route("/", native.compat, methods=["POST"]),
        Route("/generate", native.generate, methods=["POST"]),
        Route("/generate_stream", native.generate_stream, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/messages", anthropic.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
        Route("/invocations", sagemaker.invocations, methods=["POST"]),
        Route("/vertex", vertex.predict, methods=["POST"]),
        *(Route(path, tokens.tokenize, methods=["POST"]) for path in ("/tokenize", "/v1/tokenize")),
        *(Route(path, tokens.detokenize, methods=["POST"]) for path in ("/detokenize", "/v1/detokenize")),
        Route("/chat_tokenize", tokens.chat_tokenize, methods=["POST"]),
        Route("/v1/load_lora_adapter", adapters.load_adapter, methods=["POST"]),
        Route("/v1/unload_lora_adapter", adapters.unload_adapter, methods=["POST"]),
        *(Route(path, list_models) for path in ("/v1/models", "/models")),
        *(Route(path, show_model) for path in ("/v1/models/{model:path}", "/models/{model:path}")),
        Route("/info", misc.info),
        *(Route(path, misc.health) for path in ("/", "/health", "/ping", "/v1/health")),
        Route("/metrics", misc.metrics),
        Route("/docs", docs.page),
        Route("/api-doc/openapi.json", docs.document),
        *_ui(),
        *_kserve(),
    ]


def _chosen(config: ServerConfig) -> list[Route]:
    """The paths that Vertex AI chose, which go before ours; TidyPaths takes their last slash."""
    chosen: list[Route] = []
    if config.predict_route:
        chosen.append(Route(config.predict_route.rstrip("/") or "/", vertex.predict, methods=["POST"]))
    if config.health_route:
        chosen.append(Route(config.health_route.rstrip("/") or "/", misc.health))
    return chosen


def _ui() -> list[Route]:
    return [
        Route("/ui", ui.page),
        Route("/ui/lanes", ui.lanes),
        Route(f"/ui/{ui.STYLE}", ui.style),
        *(Route(f"/ui/{name}", ui.script) for name in ui.SCRIPTS),
    ]


def _kserve() -> list[Route]:
    """The model's name may hold slashes; the version may be left out."""
    models = ("/v2/models/{model:path}/versions/{version}", "/v2/models/{model:path}")
    return [
        Route("/v2", kserve.metadata),
        Route("/v2/health/live", kserve.live),
        Route("/v2/health/ready", kserve.ready),
        *(Route(f"{path}/infer", kserve.infer, methods=["POST"]) for path in models),
        *(Route(f"{path}/ready", kserve.ready) for path in models),
        *(Route(path, kserve.model) for path in models),
    ]


def _middleware(
    config: ServerConfig, keys: Keys, tracing: Tracing | None, models: Models | None
) -> list[Middleware]:
    """From the outside in."""
    cors: list[Middleware] = []
    if config.cors_allow_origins:
        cors.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_allow_origins,
                allow_methods=["GET", "POST"],
                # Clients send headers of their own (x-stainless-…, anthropic-…) and read many. Nothing is sent that a page does
                # not have, as cookies would be, so none needs to be kept from it.
                allow_headers=["*"],
                expose_headers=["*"],
            )
        )
    return [
        Middleware(TidyPaths),
        *([Middleware(TraceRequests, tracing=tracing)] if tracing is not None else []),
        Middleware(RequestIds),
        *cors,
        Middleware(AnswerFailures),
        Middleware(RequireKey, keys=keys),
        Middleware(BodyLimit, limit=config.payload_limit, together=config.bodies_limit),
        *([Middleware(ReleaseModels, models=models)] if models is not None else []),
    ]


async def _on_error(request: HttpRequest, error: Exception) -> Response:
    # The scope's path, not request.url: a Host header can change what that says.
    return error_response(error, request.scope["path"])


async def _on_client_gone(request: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)
