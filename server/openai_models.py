"""`GET /v1/models` and `/v1/models/{id}`: what is served, with its adapters, and of several models whether each is loaded."""

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine import EngineInfo
from .errors import NoSuchModel
from .front import front_of
from .models import Models, ServedModel


async def list_models(request: HttpRequest) -> Response:
    """`GET /v1/models`."""
    models: Models | None = request.app.state.models
    if models is None:
        front = front_of(request)
        info = front.backend.serving().info
        adapters = (_adapter(front.model_name, info, name) for name in info.adapters)
        data = [_model(front.model_name, info), *adapters]
    else:
        data = [_one_of(model) for model in models.all.values()]
    return Response(orjson.dumps({"object": "list", "data": data}), media_type="application/json")


async def show_model(request: HttpRequest) -> Response:
    """`GET /v1/models/{id}`; ids contain slashes."""
    asked, models = request.path_params["model"], request.app.state.models
    if models is not None:
        return Response(orjson.dumps(_one_of(models.find(asked))), media_type="application/json")
    front = front_of(request)
    info = front.backend.serving().info
    if asked in info.adapters:
        told = _adapter(front.model_name, info, asked)
        return Response(orjson.dumps(told), media_type="application/json")
    if asked not in (front.model_name, info.model_id):
        raise NoSuchModel(
            f"The model {asked[:200]!r} does not exist; this server has {front.model_name!r}", param="model"
        )
    return Response(orjson.dumps(_model(front.model_name, info)), media_type="application/json")


def _one_of(model: ServedModel) -> dict[str, object]:
    """What is known of a model while it is not loaded is its name."""
    serving = model.backend.latest
    told = _model(model.name, None if serving is None else serving.info)
    return {**told, "state": model.state, "why": model.why or None}


def _model(name: str, info: EngineInfo | None) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": name,
        "root": name if info is None else info.model_id,
        "parent": None,
        "max_model_len": None if info is None else info.max_total_tokens,
    }


def _adapter(model: str, info: EngineInfo, name: str) -> dict[str, object]:
    """As vLLM lists one: a model whose parent is the one it adds to."""
    return {**_model(model, info), "id": name, "root": name, "parent": model}
