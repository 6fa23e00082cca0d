"""The bodies of the serving platforms: Vertex AI's and KServe's (Open Inference Protocol v2). Checks shapes only."""

from typing import Annotated, Any

import msgspec

from .schema_tgi import GenerateParameters

ANY_INSTANCE = msgspec.Meta(
    extra_json_schema={
        "anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("GenerateBody", "ChatBody")]
    }
)


class VertexBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /vertex`. Each instance is a body of `/generate` or of `/v1/chat/completions`; `parameters` holds for native
    instances that have none of their own."""

    instances: list[Annotated[Any, ANY_INSTANCE]]
    parameters: GenerateParameters | None = None


class InferInput(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor: `data` is a list of texts, or, as TGI has it, the UTF-8 bytes of one text."""

    name: str
    data: list[str | int]
    shape: list[int] | None = None
    datatype: str = "BYTES"


class InferOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What to call the answer to the input in the same place."""

    name: str


class InferBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v2/models/{model}/infer`."""

    inputs: list[InferInput]
    id: str | None = None
    parameters: GenerateParameters | None = None
    outputs: list[InferOutput] | None = None
