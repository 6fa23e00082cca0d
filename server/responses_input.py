"""The `input` of a response → a conversation. Knows the items of the Responses API; no template, no ids."""

from typing import TypeVar

import msgspec

from .chat import Conversation, text_of
from .errors import Invalid, Unsupported
from .schema_openai import ContentPart, Message
from .schema_responses import Item, ResponsesBody
from .tools import response_tools

T = TypeVar("T")

ROLES = ("user", "assistant", "system", "developer")


def conversation_of(body: ResponsesBody) -> Conversation:
    """What was said, the instructions first. Raises Invalid, Unsupported."""
    messages: list[Message] = []
    if body.instructions:
        messages.append(Message("system", body.instructions))
    if isinstance(body.input, str):
        messages.append(Message("user", body.input))
    elif body.input:
        messages += _messages(body.input)
    else:
        raise Invalid("`input` must not be empty", param="input")
    effort = body.reasoning.effort if body.reasoning else None
    kwargs = {} if effort is None else {"reasoning_effort": effort}
    # Unlike in a chat, a last message of the assistant is not one to go on with.
    tools = response_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    return Conversation(messages, "input", add_generation_prompt=True, switches=kwargs, tools=tools)


def _messages(items: list[Item]) -> list[Message]:
    messages: list[Message] = []
    thought = ""
    for i, item in enumerate(items):
        if item.type == "reasoning":
            thought += _thought(item)
            continue
        message = _message(f"input[{i}]", item)
        if message.role == "assistant" and thought:
            message = msgspec.structs.replace(message, reasoning_content=thought)
        # A text and the calls behind it are one message to a template.
        if item.type == "function_call" and messages and messages[-1].role == "assistant" and not thought:
            before = messages.pop()
            calls = [*(before.tool_calls or ()), *(message.tool_calls or ())]
            message = msgspec.structs.replace(before, tool_calls=calls)
        messages.append(message)
        thought = ""
    if not messages:
        raise Invalid("`input` has no message", param="input")
    return messages


def _message(place: str, item: Item) -> Message:
    if item.type == "function_call":
        function = {"name": _needed(place, "name", item.name), "arguments": item.arguments or ""}
        call = {"id": _needed(place, "call_id", item.call_id), "type": "function", "function": function}
        return Message("assistant", tool_calls=[call])
    if item.type == "function_call_output":
        text = text_of(f"{place}.output", _needed(place, "output", item.output))
        return Message("tool", text, tool_call_id=_needed(place, "call_id", item.call_id))
    if item.type not in (None, "message"):
        raise Unsupported(
            f"`{place}` is of type {item.type[:50]!r}, which this server cannot take", param=f"{place}.type"
        )
    if item.role not in ROLES:
        raise Invalid(f"`{place}.role` must be one of {', '.join(ROLES)}", param=f"{place}.role")
    if item.content is None:
        raise Invalid(f"`{place}.content` must not be null", param=f"{place}.content")
    return Message(item.role, text_of(f"{place}.content", item.content))


def _needed(place: str, name: str, value: T | None) -> T:
    if value is None:
        raise Invalid(f"`{place}.{name}` is missing", param=f"{place}.{name}")
    return value


def _thought(item: Item) -> str:
    """What was thought, or the summary of it; what is encrypted was not by us, and cannot be read."""
    content: list[ContentPart] = item.content if isinstance(item.content, list) else []
    return "".join(part.text or "" for part in content or item.summary or ())
