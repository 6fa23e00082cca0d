"""Messages → prompt text, by the model's chat template. Knows the roles and parts of the chat API; no HTTP, no ids."""

import json
from typing import Any

from ..models.errors import TokenizerError
from .backend import Serving
from .errors import Invalid, TemplateFailed
from .front import Front
from .schema_openai import ChatBody, ContentPart, Message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
RESERVED = (
    "messages", "tools", "add_generation_prompt", "continue_final_message", "conversation", "chat_template",
    "tokenize", "documents", "return_tensors", "return_dict", "padding", "truncation", "max_length",
)  # fmt: skip
"""Names a template's caller must not set: arguments of the rendering itself."""


async def render(front: Front, serving: Serving, body: ChatBody) -> str:
    """The prompt of a conversation. Raises Invalid, TemplateFailed."""
    messages = [_message(i, message) for i, message in enumerate(body.messages)]
    if not messages:
        raise Invalid("`messages` must not be empty", param="messages")
    # TGI's rule: a last message of the assistant is one to go on with, not one to answer.
    resume = body.continue_final_message
    if resume is None:
        resume = messages[-1]["role"] == "assistant" and not body.add_generation_prompt
    add_prompt = body.add_generation_prompt
    if add_prompt is None:
        add_prompt = not resume
    if resume and add_prompt:
        raise Invalid(
            "`continue_final_message` and `add_generation_prompt` exclude each other",
            param="continue_final_message",
        )
    kwargs = _template_kwargs(body)

    def apply() -> str:
        return serving.tokenizer.apply_chat(
            messages, add_generation_prompt=add_prompt, continue_final_message=resume, **kwargs
        )

    try:
        return await front.workers.run(apply)
    except TokenizerError as error:
        raise TemplateFailed(str(error), param="messages") from error


def _template_kwargs(body: ChatBody) -> dict[str, Any]:
    kwargs = dict(body.chat_template_kwargs or {})
    for name in kwargs:
        if name in RESERVED:
            raise Invalid(f"`chat_template_kwargs.{name}` cannot be set", param="chat_template_kwargs")
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return kwargs


def _message(index: int, message: Message) -> dict[str, Any]:
    """One message as templates take it: text content, `system` for `developer`, tool arguments as objects."""
    if message.role not in ROLES:
        raise Invalid(
            f"`messages[{index}].role` must be one of {', '.join(ROLES)}", param=f"messages[{index}].role"
        )
    role = "system" if message.role == "developer" else message.role
    if message.content is None and not (role == "assistant" and message.tool_calls):
        raise Invalid(f"`messages[{index}].content` must not be null", param=f"messages[{index}].content")
    rendered: dict[str, Any] = {"role": role, "content": _text(index, message.content)}
    if message.tool_calls:
        rendered["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            rendered[name] = value
    return rendered


def _text(index: int, content: str | list[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            raise Invalid(
                f"`messages[{index}].content` has a part of type {part.type[:50]!r}; this model takes text only",
                param=f"messages[{index}].content",
            )
    return "".join(part.text or "" for part in content)


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Clients send arguments as JSON text; templates want the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
