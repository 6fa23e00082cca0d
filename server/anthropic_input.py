"""System and messages of Anthropic's API → a conversation. Knows its blocks; no template, no ids."""

from collections.abc import Sequence
from typing import Any

from .chat import Conversation
from .errors import Invalid, Unsupported
from .schema_anthropic import Block, CountBody, Turn
from .schema_openai import Message

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
    messages += [_message(f"messages[{i}]", turn) for i, turn in enumerate(body.messages)]
    return Conversation(messages, template_kwargs=_switches(body))


def shows_thinking(body: CountBody) -> bool:
    """Whether thinking is told; by default it is, where a model thinks."""
    return body.thinking is None or body.thinking.type != "disabled"


def _system(system: str | Sequence[Block] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    blocks = [block for block in system if not (block.text or "").startswith(BILLING)]
    return "\n".join(_text(f"system[{i}]", block) for i, block in enumerate(blocks))


def _message(place: str, turn: Turn) -> Message:
    if turn.role not in ROLES:
        raise Invalid(f"`{place}.role` must be one of {', '.join(ROLES)}", param=f"{place}.role")
    if isinstance(turn.content, str):
        return Message(turn.role, turn.content)
    texts: list[str] = []
    thoughts: list[str] = []
    for i, block in enumerate(turn.content):
        if block.type == "thinking":
            thoughts.append(block.thinking or "")
        # What is redacted was not thought here.
        elif block.type != "redacted_thinking":
            texts.append(_text(f"{place}.content[{i}]", block))
    return Message(turn.role, "".join(texts), reasoning_content="".join(thoughts) or None)


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
