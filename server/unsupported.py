"""Known parameters this server has no effect for yet. A line leaves a table in the commit that adds the effect.

A listed parameter is accepted while its value asks for nothing, and refused by name otherwise: never ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .errors import Unsupported


def _never(value: Any) -> bool:
    return False


def _empty(value: Any) -> bool:
    return not value


def _true(value: Any) -> bool:
    return value is True


def _one(value: Any) -> bool:
    return value == 1


def _text_only(value: Any) -> bool:
    return value == ["text"]


def _disabled(value: Any) -> bool:
    return value == "disabled"


SHARED: dict[str, Callable[[Any], bool]] = {
    # What vLLM's users may send; their neutral values are what happens anyway.
    "use_beam_search": _empty,
    "length_penalty": _one,
    "allowed_token_ids": _empty,
    "bad_words": _empty,
    "truncate_prompt_tokens": _never,
    "skip_special_tokens": _true,
    "return_token_ids": _empty,
    "return_tokens_as_token_ids": _empty,
}

CHAT: dict[str, Callable[[Any], bool]] = {
    **SHARED,
    # The template is the model's. A client's own could be made to run for minutes.
    "chat_template": _never,
    "echo": _empty,
    "documents": _empty,
    "modalities": _text_only,
    "audio": _never,
    "web_search_options": _never,
}

COMPLETION: dict[str, Callable[[Any], bool]] = {
    **SHARED,
    "suffix": _empty,
}

RESPONSES: dict[str, Callable[[Any], bool]] = {
    # Nothing is stored, so there is nothing to go on from.
    "previous_response_id": _never,
    "conversation": _never,
    "prompt": _never,
    "background": _empty,
    "truncation": _disabled,
}

MESSAGES: dict[str, Callable[[Any], bool]] = {
    "mcp_servers": _empty,
    "container": _never,
}


def refuse(body: object, table: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raises Unsupported for the first parameter of the table that asks for something. A dot goes into an object."""
    for name, asks_nothing in table.items():
        value: Any = body
        for step in name.split("."):
            value = None if value is None else getattr(value, step)
        if value is not None and not asks_nothing(value):
            raise Unsupported(f"`{name}` is not supported by this server", param=name)
