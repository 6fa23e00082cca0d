"""`GET /v1/models` and `/v1/models/{id}`: one model, under the names it answers to."""

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .backend import Serving
from .errors import NoSuchModel
from .front import Front, front_of


async def list_models(request: HttpRequest) -> Response:
    """`GET /v1/models`."""
    front = front_of(request)
    models = [_model(front, front.backend.serving())]
    return Response(orjson.dumps({"object": "list", "data": models}), media_type="application/json")


async def show_model(request: HttpRequest) -> Response:
    """`GET /v1/models/{id}`; ids contain slashes."""
    front = front_of(request)
    serving, asked = front.backend.serving(), request.path_params["model"]
    if asked not in (front.model_name, serving.info.model_id):
        raise NoSuchModel(
            f"The model {asked[:200]!r} does not exist; this server has {front.model_name!r}", param="model"
        )
    return Response(orjson.dumps(_model(front, serving)), media_type="application/json")


def _model(front: Front, serving: Serving) -> dict[str, object]:
    name = front.model_name
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": name,
        "root": serving.info.model_id,
        "parent": None,
        "max_model_len": serving.info.max_total_tokens,
    }
