"""What an answer has to look like, in the words of each API → one `Form`. Knows their fields; no grammar, no template.

TGI's `grammar` and `response_format`, OpenAI's `response_format` and `text.format`, Anthropic's `output_config.format` and the
`output_format` before it, vLLM's `structured_outputs` and the `guided_…` before it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from .errors import Invalid, Unsupported
from .schema_openai import ChatBody, CompletionBody

Kind = Literal["json", "regex", "choice", "grammar"]
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of JSON mode."""
_NO_FALLBACK = "disable_fallback"
"""Of vLLM's `structured_outputs`; there is nothing here to fall back to."""


@dataclass(frozen=True, slots=True)
class Form:
    """What the text of an answer must match."""

    kind: Kind
    """A JSON schema, a regular expression, one of several texts, or a grammar in Lark or GBNF."""
    value: Any
    """A mapping or a boolean for `json`, a list of texts for `choice`, else a text."""
    param: str
    """Where it stood, for the error that says what is wrong with it."""


def tgi_form(value: Any, param: str = "grammar") -> Form | None:
    """TGI's `{"type", "value"}`. Raises Invalid."""
    if value is None:
        return None
    kind = _type_of(value, param)
    if kind not in ("json", "json_object", "json_schema", "regex"):
        raise Invalid(
            f"`{param}.type` must be json, json_schema or regex. Given: {kind[:50]!r}", param=f"{param}.type"
        )
    if "value" not in value:
        raise Invalid(f"`{param}` needs a `value`", param=f"{param}.value")
    inner, place = value["value"], f"{param}.value"
    if kind == "regex":
        return Form("regex", _text(inner, place), place)
    if kind == "json_schema" and isinstance(inner, Mapping) and "schema" in inner:
        inner, place = inner["schema"], f"{place}.schema"
    return Form("json", _schema(inner, place), place)


def response_format(value: Any) -> Form | None:
    """OpenAI's, or TGI's under the same name. Raises Invalid, Unsupported."""
    param = "response_format"
    if value is None:
        return None
    if isinstance(value, Mapping) and "value" in value:
        return tgi_form(value, param)
    kind = _type_of(value, param)
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise Invalid(f"`{param}.json_schema.schema` is missing", param=f"{param}.json_schema.schema")
        return Form(
            "json", _schema(inner["schema"], f"{param}.json_schema.schema"), f"{param}.json_schema.schema"
        )
    return _plain(kind, value, param)


def text_format(value: Any, param: str) -> Form | None:
    """The flat form of the Responses API (`text.format`) and of Anthropic's (`output_config.format`). Raises Invalid,
    Unsupported."""
    if value is None:
        return None
    kind = _type_of(value, param)
    if kind == "json_schema":
        if "schema" not in value:
            raise Invalid(f"`{param}.schema` is missing", param=f"{param}.schema")
        return Form("json", _schema(value["schema"], f"{param}.schema"), f"{param}.schema")
    return _plain(kind, value, param)


def form_of(body: ChatBody | CompletionBody) -> Form | None:
    """What a chat or a completion asks for, under whichever name. Raises Invalid, Unsupported."""
    found = [
        form
        for form in (
            response_format(body.response_format),
            _structured(body.structured_outputs),
            *(_guided(body, name, make) for name, make in _KINDS.items()),
        )
        if form is not None
    ]
    if len(found) > 1:
        names = " and ".join(f"`{form.param}`" for form in found[:2])
        raise Invalid(f"{names} exclude each other", param=found[1].param)
    return found[0] if found else None


def _plain(kind: str, value: Mapping[str, Any], param: str) -> Form | None:
    """The types without a schema of their own; llama.cpp's clients send one with `json_object` all the same."""
    if kind == "text":
        return None
    if kind == "json_object":
        return Form("json", _schema(value.get("schema") or ANY_OBJECT, f"{param}.schema"), param)
    raise Unsupported(
        f"`{param}.type` must be text, json_object or json_schema. Given: {kind[:50]!r}",
        param=f"{param}.type",
    )


def _structured(value: Any) -> Form | None:
    param = "structured_outputs"
    if not value:
        return None
    if not isinstance(value, Mapping):
        raise Invalid(f"`{param}` must be an object", param=param)
    given = {n: inner for n, inner in value.items() if inner not in (None, False) and n != _NO_FALLBACK}
    unknown = next((name for name in given if name not in (*_KINDS_OF, "json_object")), None)
    if unknown is not None:
        raise Unsupported(f"`{param}.{unknown[:50]}` is not supported by this server", param=param)
    if len(given) > 1:
        raise Invalid(f"`{param}` takes one of {', '.join(given)}, not several", param=param)
    if not given:
        return None
    ((name, inner),) = given.items()
    if name == "json_object":
        return Form("json", ANY_OBJECT, f"{param}.{name}")
    return _KINDS_OF[name](inner, f"{param}.{name}")


def _guided(body: ChatBody | CompletionBody, name: str, make: Callable[[Any, str], Form]) -> Form | None:
    value = getattr(body, name)
    return None if value is None else make(value, name)


def _json(value: Any, param: str) -> Form:
    return Form("json", _schema(value, param), param)


def _regex(value: Any, param: str) -> Form:
    return Form("regex", _text(value, param), param)


def _choice(value: Any, param: str) -> Form:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise Invalid(f"`{param}` must be a list of texts, none of them empty", param=param)
    return Form("choice", value, param)


def _grammar(value: Any, param: str) -> Form:
    return Form("grammar", _text(value, param), param)


_KINDS_OF: Mapping[str, Callable[[Any, str], Form]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
_KINDS = {f"guided_{name}": make for name, make in _KINDS_OF.items()}


def _type_of(value: Any, param: str) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str):
        raise Invalid(f"`{param}` must be an object with a `type`", param=param)
    return kind


def _schema(value: Any, param: str) -> Any:
    """A JSON schema, as itself or as JSON text."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Invalid(f"`{param}` is not valid JSON: {error}", param=param) from None
    if not isinstance(value, Mapping | bool):
        raise Invalid(f"`{param}` must be a JSON schema, which is an object", param=param)
    return value


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise Invalid(f"`{param}` must be a text, and not empty", param=param)
    return value
