"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: which adapters are served, changed while serving, as vLLM does it.

Knows names and places; what fits the model the engine knows.
"""

from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from ..models.errors import HubError
from ..models.hub import resolve_adapter
from .backend import Serving
from .body import read_body
from .entry import Entry
from .errors import Invalid, NoSuchModel
from .front import Front
from .loaded import detached
from .schema_adapters import LoadAdapterBody, UnloadAdapterBody
from .validate_openai import ANY_MODEL

MOST_NAME_CHARS = 200


async def load_adapter(request: HttpRequest) -> Response:
    """`POST /v1/load_lora_adapter`: serve an adapter from a directory or the Hub; who may is said in auth.py."""
    body = await read_body(request, LoadAdapterBody)
    front = await Entry(request).front()
    _check_name(body, front, front.backend.serving())
    folder = await detached(lambda: _found(body.lora_path, front.backend.hub_cache))
    serving = front.backend.serving()
    _check_name(body, front, serving)  # fetching it took its time
    await serving.engine.load_adapter(body.lora_name, str(folder))
    front.backend.update(await serving.engine.info())
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(request: HttpRequest) -> Response:
    """`POST /v1/unload_lora_adapter`: serve an adapter no more. Requests that have begun keep it to their end."""
    body = await read_body(request, UnloadAdapterBody)
    front = await Entry(request).front()
    serving = front.backend.serving()
    if body.lora_name not in serving.info.adapters:
        there = ", ".join(map(repr, serving.info.adapters)) or "none"
        raise NoSuchModel(
            f"There is no adapter {body.lora_name[:MOST_NAME_CHARS]!r} here; there are: {there}",
            param="lora_name",
        )
    await serving.engine.unload_adapter(body.lora_name)
    front.backend.update(await serving.engine.info())
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check_name(body: LoadAdapterBody, front: Front, serving: Serving) -> None:
    """Raises Invalid for a name that is none, or is somebody's."""
    name, info = body.lora_name, serving.info
    if not name.strip() or len(name) > MOST_NAME_CHARS:
        raise Invalid(f"`lora_name` has to have 1 to {MOST_NAME_CHARS} characters", param="lora_name")
    if name in (*ANY_MODEL, front.model_name, info.model_id):
        raise Invalid(f"`lora_name` {name!r} is the model's own name; choose another", param="lora_name")
    if name in info.adapters and not body.load_inplace:
        raise Invalid(
            f"The adapter {name!r} is loaded already; unload it first, or replace it with `load_inplace`",
            param="lora_name",
        )


def _found(place: str, hub_cache: str | None) -> Path:
    """The folder, fetched if need be. Raises Invalid."""
    try:
        return resolve_adapter(place, hub_cache)
    except (HubError, OSError, ValueError) as error:
        raise Invalid(f"`lora_path` {error}", param="lora_path") from None
