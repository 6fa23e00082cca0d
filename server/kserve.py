"""KServe's Open Inference Protocol v2: `/v2…`. Knows its JSON; the work is instances.py's.

The model's name in the path is the InferenceService's, which this server cannot know, so any is taken. `live` says that
this process answers; `ready` that generations are served now (TGI says both always).
"""

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .body import read_body
from .entry import Entry
from .errors import Invalid
from .front import front_of
from .headers import Clock
from .instances import generate_all
from .misc import why_unhealthy
from .schema_platforms import InferBody, InferInput
from .schema_tgi import GenerateBody, GenerateParameters
from .stream import unless_gone
from .validate_tgi import details_wanted


async def live(request: HttpRequest) -> Response:
    """`GET /v2/health/live`: whoever answers is alive; an engine that died is restarted from within."""
    return _json({"live": True})


async def ready(request: HttpRequest) -> Response:
    """`GET /v2/health/ready` and `/v2/models/{model}/ready`."""
    reason = await why_unhealthy(request)
    if reason is None:
        return _json({"live": True, "ready": True})
    return _json({"live": True, "ready": False, "error": reason}, 503, {"retry-after": "1"})


async def metadata(request: HttpRequest) -> Response:
    """`GET /v2`."""
    serving = front_of(request).backend.latest
    version = "" if serving is None else serving.info.version
    return _json({"name": "xlane", "version": version, "extensions": ["health", "models", "metrics"]})


async def model(request: HttpRequest) -> Response:
    """`GET /v2/models/{model}`."""
    version = request.path_params.get("version", front_of(request).backend.serving().info.model_sha or "")
    name = request.path_params["model"]
    return _json({"name": name, "version": version, "extensions": ["infer", "ready"]})


async def infer(request: HttpRequest) -> Response:
    """`POST /v2/models/{model}/infer`: every text of every input is one prompt."""
    clock = Clock()
    body = await read_body(request, InferBody)
    names = _output_names(body)
    texts = [_texts(i, tensor) for i, tensor in enumerate(body.inputs)]
    prompts = [GenerateBody(inputs=text, parameters=_parameters(body)) for group in texts for text in group]
    answers = iter(await unless_gone(request, generate_all(await Entry(request).front(), prompts, clock)))
    outputs: list[dict[str, object]] = []
    for name, tensor, group in zip(names, body.inputs, texts, strict=True):
        generated = [str(next(answers)) for _ in group]
        as_bytes = isinstance(tensor.data[0], int)
        data = list(generated[0].encode()) if as_bytes else generated
        shape = [1, len(data)] if as_bytes else [len(data)]
        outputs.append({"name": name, "shape": shape, "datatype": "BYTES", "data": data})
    return _json({"id": body.id, "model_name": request.path_params["model"], "outputs": outputs})


def _parameters(body: InferBody) -> GenerateParameters | None:
    if body.parameters is not None and details_wanted(body.parameters):
        raise Invalid("`details` are not possible here: an output is a text", param="parameters")
    return body.parameters


def _output_names(body: InferBody) -> list[str]:
    if not body.inputs:
        raise Invalid("`inputs` cannot be empty", param="inputs")
    if body.outputs is None:
        return [tensor.name for tensor in body.inputs]
    if len(body.outputs) != len(body.inputs):
        raise Invalid(
            f"`inputs` and `outputs` must have the same length. Given: {len(body.inputs)} and {len(body.outputs)}",
            param="outputs",
        )
    return [output.name for output in body.outputs]


def _texts(index: int, tensor: InferInput) -> list[str]:
    """The prompts of one tensor. Raises Invalid."""
    place = f"`inputs[{index}].data`"
    if tensor.datatype != "BYTES":
        raise Invalid(f"`inputs[{index}].datatype` must be BYTES", param="inputs")
    texts = [item for item in tensor.data if isinstance(item, str)]
    octets = [item for item in tensor.data if isinstance(item, int)]
    if not tensor.data or len(tensor.data) not in (len(texts), len(octets)):
        raise Invalid(f"{place} must be texts, or the UTF-8 bytes of one, and not empty", param="inputs")
    if texts:
        return texts
    try:
        return [bytes(octets).decode()]
    except (ValueError, OverflowError):
        raise Invalid(f"{place} must be UTF-8", param="inputs") from None


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")
