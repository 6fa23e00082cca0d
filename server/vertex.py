"""`POST /vertex`, Vertex AI's prediction contract: instances in, predictions out. Knows its JSON; the work is instances.py's.

Every parameter of an instance counts and errors keep their status; TGI honours two parameters and answers 500 to all.
"""

from typing import Any

import msgspec
import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .body import read_body
from .entry import Entry
from .errors import Invalid, WrongShape
from .headers import Clock
from .instances import Instance, generate_all
from .schema_openai import ChatBody
from .schema_platforms import VertexBody
from .schema_tgi import GenerateBody, GenerateParameters
from .stream import unless_gone


async def predict(request: HttpRequest) -> Response:
    """`POST /vertex`."""
    clock = Clock()
    # Whatever path Vertex chose, errors take this route's shape.
    request.scope["path"] = "/vertex"
    body = await read_body(request, VertexBody)
    if not body.instances:
        raise Invalid("`instances` cannot be empty", param="instances")
    instances = [_instance(i, raw, body.parameters) for i, raw in enumerate(body.instances)]
    predictions = await unless_gone(request, generate_all(await Entry(request).front(), instances, clock))
    return Response(orjson.dumps({"predictions": predictions}), media_type="application/json")


def _instance(index: int, raw: Any, parameters: GenerateParameters | None) -> Instance:
    """Raises WrongShape."""
    try:
        if isinstance(raw, dict) and "inputs" in raw:
            body = msgspec.convert(raw, GenerateBody)
            if body.parameters is None and parameters is not None:
                return msgspec.structs.replace(body, parameters=parameters)
            return body
        if isinstance(raw, dict) and "messages" in raw:
            return msgspec.convert(raw, ChatBody)
    except msgspec.ValidationError as error:
        raise WrongShape(f"instance {index}: {error}", param="instances") from None
    raise WrongShape(f"instance {index} needs `inputs` or `messages`", param="instances")
