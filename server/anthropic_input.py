"""System and messages of Anthropic's API → a conversation. Knows its blocks; no template, no ids."""

from collections.abc import Sequence
from typing import Any

from .chat import Conversation
from .errors import Invalid, Unsupported
from .schema_anthropic import Block, CountBody, Turn
from .schema_openai import Message
from .tools import message_tools

ROLES = ("user", "assistant", "system")
BILLING = "x-anthropic-billing-header"
"""Claude Code's first block of `system`: different in each request, for its maker only, and the end of any cached prefix."""


def conversation_of(body: CountBody) -> Conversation:
    """What was said, the system prompt first; a last message of the assistant is gone on with. Raises Invalid, Unsupported."""
    messages: list[Message] = []
    if system := _system(body.system):
        messages.append(Message("system", system))
    if not body.messages:
        raise Invalid("`messages` must not be empty", param="messages")
    for i, turn in enumerate(body.messages):
        messages += _messages(f"messages[{i}]", turn)
    tools = message_tools(body.tools, body.tool_choice)
    return Conversation(messages, switches=_switches(body), tools=tools)


def shows_thinking(body: CountBody) -> bool:
    """Whether thinking is told; by default it is, where a model thinks."""
    return body.thinking is None or body.thinking.type != "disabled"


def _system(system: str | Sequence[Block] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    blocks = [block for block in system if not (block.text or "").startswith(BILLING)]
    return "\n".join(_text(f"system[{i}]", block) for i, block in enumerate(blocks))


def _messages(place: str, turn: Turn) -> list[Message]:
    """A turn as messages: results of tools are messages of their own."""
    if turn.role not in ROLES:
        raise Invalid(f"`{place}.role` must be one of {', '.join(ROLES)}", param=f"{place}.role")
    if isinstance(turn.content, str):
        return [Message(turn.role, turn.content)]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    for i, block in enumerate(turn.content):
        where = f"{place}.content[{i}]"
        if block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use" and turn.role == "assistant":
            calls.append(_call(where, block))
        elif block.type == "tool_result" and turn.role == "user":
            results.append(_result(where, block))
        # What is redacted was not thought here.
        elif block.type != "redacted_thinking":
            texts.append(_text(where, block))
    if results and not texts:
        return results
    thought = "".join(thoughts) or None
    return [*results, Message(turn.role, "".join(texts), tool_calls=calls or None, reasoning_content=thought)]


def _call(place: str, block: Block) -> dict[str, Any]:
    if not block.id or not block.name or not isinstance(block.input, dict):
        raise Invalid(f"`{place}` needs an `id`, a `name`, and an object as `input`", param=place)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


def _result(place: str, block: Block) -> Message:
    if not block.tool_use_id:
        raise Invalid(f"`{place}.tool_use_id` is missing", param=f"{place}.tool_use_id")
    content = block.content or ""
    if not isinstance(content, str):
        content = "".join(_text(f"{place}.content[{i}]", part) for i, part in enumerate(content))
    # No template has a place for it.
    failed = "Error: " if block.is_error else ""
    return Message("tool", failed + content, tool_call_id=block.tool_use_id)


def _text(place: str, block: Block) -> str:
    if block.type != "text":
        raise Unsupported(
            f"`{place}` is of type {block.type[:50]!r}, which this server cannot take", param=f"{place}.type"
        )
    if block.text is None:
        raise Invalid(f"`{place}.text` must not be null", param=f"{place}.text")
    return block.text


def _switches(body: CountBody) -> dict[str, Any]:
    """What templates call these choices; the name of one is ignored by the other."""
    switches: dict[str, Any] = {}
    if body.thinking is not None:
        switches["enable_thinking"] = switches["thinking"] = body.thinking.type != "disabled"
    if body.output_config is not None and body.output_config.effort is not None:
        switches["reasoning_effort"] = body.output_config.effort
    return switches
