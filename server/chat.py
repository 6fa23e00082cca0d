"""Messages → prompt text, by the model's chat template. Knows the roles and parts of the chat API; no HTTP, no ids."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models.errors import TemplateTooCostly, TokenizerError
from ..models.template_processes import TemplateLimits
from .backend import Serving
from .errors import Invalid, TemplateFailed
from .front import Front
from .schema_openai import ChatBody, ContentPart, Message
from .tool_prompt import fitted, tools_of, with_prompt
from .tools import ToolUse, chat_tools, legacy_tools

_NEWER = {"developer": "system", "function": "tool"}
"""Roles that templates know by another name."""
_LIMITS = {"time": "template_timeout_s", "memory": "template_memory_bytes"}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and how to render them, whichever API they came through."""

    messages: Sequence[Message]
    place: str = "messages"
    """What its sender calls the messages."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, as the client names them."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """Variables that other fields speak of, for templates that read them."""
    tools: ToolUse | None = None
    """What may be called."""
    tool_prompt: str | None = None
    """What the last message ends with, if tools may be called."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it."""

    text: str
    thinking: bool
    """Whether it ends where the model's thinking has begun."""


def conversation_of(body: ChatBody) -> Conversation:
    """The conversation of a chat. Raises Invalid."""
    if body.tools and body.functions:
        raise Invalid("`functions` and `tools` exclude each other", param="functions")
    legacy = bool(body.functions) or body.function_call not in (None, "none", "auto")
    return Conversation(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs or {},
        switches={} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort},
        tools=legacy_tools(body.functions, body.function_call)
        if legacy
        else chat_tools(body.tools, body.tool_choice, body.parallel_tool_calls),
        tool_prompt=body.tool_prompt,
    )


async def render(front: Front, serving: Serving, conversation: Conversation) -> Rendered:
    """The prompt of a conversation. Raises Invalid, TemplateFailed."""
    try:
        return await _render(front, serving, conversation)
    except RecursionError:
        place = conversation.place
        raise Invalid(f"`{place}` is nested too deeply for a chat template", param=place) from None


async def _render(front: Front, serving: Serving, conversation: Conversation) -> Rendered:
    place = conversation.place
    messages = [_message(f"{place}[{i}]", message) for i, message in enumerate(conversation.messages)]
    if not messages:
        raise Invalid(f"`{place}` must not be empty", param=place)
    resume, add_prompt = _ending(conversation, messages[-1]["role"])
    form, use = serving.tool_format, conversation.tools
    messages = fitted(messages, form, use)
    if use is not None and conversation.tool_prompt:
        messages = with_prompt(messages, conversation.tool_prompt)

    told = tools_of(use) if use is not None and form.told else None

    config = front.config
    limits = TemplateLimits(config.template_timeout_s, config.template_memory_bytes)

    def apply() -> str:
        if given := conversation.template_kwargs:
            _check_variables(given, serving.tokenizer.template_variables(tools=bool(told), limits=limits))
        return serving.tokenizer.apply_chat(
            messages,
            told,
            add_generation_prompt=add_prompt,
            continue_final_message=resume,
            limits=limits,
            **{**conversation.switches, **given},
        )

    try:
        text = await front.workers.run(apply)
    except TemplateTooCostly as error:
        raise TemplateFailed(f"{error} (--limit {_LIMITS[error.took]}=…)", param=place) from error
    except TokenizerError as error:
        raise TemplateFailed(str(error), param=place) from error
    markers, declared = front.markers(serving), serving.declared
    resumed = messages[-1]["content"] if resume else ""
    if declared is not None:
        return Rendered(text, front.parts_thinking and declared.left_open(text))
    return Rendered(text, markers is not None and markers.left_open(text, resumed))


def _ending(conversation: Conversation, last_role: str) -> tuple[bool, bool]:
    """Whether to go on with the last message, and whether to begin an answer. Raises Invalid."""
    # TGI's rule: a last message of the assistant is one to go on with, not one to answer.
    resume = conversation.continue_final_message
    if resume is None:
        resume = last_role == "assistant" and not conversation.add_generation_prompt
    add_prompt = conversation.add_generation_prompt
    if add_prompt is None:
        add_prompt = not resume
    if resume and add_prompt:
        raise Invalid(
            "`continue_final_message` and `add_generation_prompt` exclude each other",
            param="continue_final_message",
        )
    return resume, add_prompt


def _check_variables(given: Mapping[str, Any], allowed: frozenset[str]) -> None:
    """Nothing may be set that the template does not read. Raises Invalid."""
    param = "chat_template_kwargs"
    unknown = next((name for name in given if name not in allowed), None)
    if unknown is not None:
        known = f"it reads {', '.join(sorted(allowed))}" if allowed else "it reads none"
        raise Invalid(
            f"`{param}.{unknown[:50]}` is no variable of this model's chat template; {known}", param=param
        )


def _message(place: str, message: Message) -> dict[str, Any]:
    """One message as templates take it: text content, `system` for `developer`, tool arguments as objects."""
    if message.role not in ROLES:
        raise Invalid(f"`{place}.role` must be one of {', '.join(ROLES)}", param=f"{place}.role")
    role = _NEWER.get(message.role, message.role)
    calls = message.tool_calls or []
    if message.function_call is not None:
        # It had no id, so its name and the name of what answers it are one.
        calls = [{"id": f"call_{message.function_call.get('name')}", "function": message.function_call}]
    if message.content is None and not (role == "assistant" and calls):
        raise Invalid(f"`{place}.content` must not be null", param=f"{place}.content")
    rendered: dict[str, Any] = {"role": role, "content": text_of(f"{place}.content", message.content)}
    if calls:
        rendered["tool_calls"] = [
            _tool_call(f"{place}.tool_calls[{i}]", call) for i, call in enumerate(calls)
        ]
    if message.role == "function":
        rendered["tool_call_id"] = f"call_{message.name}"
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            rendered[name] = value
    if (thought := message.reasoning_content or message.reasoning) is not None:
        rendered["reasoning_content"] = thought
    return rendered


def text_of(place: str, content: str | Sequence[ContentPart] | None) -> str:
    """The text of a message's content. Raises Invalid for a part that is none."""
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content:
        text = part.refusal if part.type == "refusal" and part.text is None else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal") or text is None:
            raise Invalid(
                f"`{place}` has a part of type {part.type[:50]!r}; this model takes text only", param=place
            )
        texts.append(text)
    return "".join(texts)


def _tool_call(place: str, call: dict[str, Any]) -> dict[str, Any]:
    """Clients send arguments as JSON text; templates want the object. Raises Invalid."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Invalid(f"`{place}.function` must be an object with a `name`", param=f"{place}.function")
    # TGI has two names for them.
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _read(arguments)
    named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {**call, "type": "function", "function": named}


def _read(arguments: str) -> Any:
    """The value of arguments in JSON; what a model wrote wrongly is told as it wrote it."""
    try:
        value = json.loads(arguments or "{}")
        # An escape can make half a character, which no prompt can have.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments
    return value
