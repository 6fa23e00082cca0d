"""Tools in a conversation, as the model's template takes them, or told in words to a model whose template knows none.

Knows messages and the formats of calls; no template, no ids.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .tool_formats import ToolFormat
from .tools import Tool, ToolUse

_DESCRIPTION = """\
You may call functions. These are the functions, one a line:
<tools>
{tools}
</tools>
To call one, answer with nothing but a JSON object with its name and its arguments between <tool_call> marks, like this:
<tool_call>
{{"name": "<name>", "arguments": {{<arguments>}}}}
</tool_call>
Each call has marks of its own. Results come back between <tool_response> marks. If no function helps, answer in words."""
_ID_CHARS = 9

Messages = list[dict[str, Any]]


def tools_of(use: ToolUse) -> list[dict[str, Any]]:
    """The tools as chat templates take them, in OpenAI's shape."""
    return [{"type": "function", "function": _told(tool)} for tool in use.tools]


def fitted(messages: Messages, form: ToolFormat, use: ToolUse | None) -> Messages:
    """The messages as the model's template takes them.

    A template that knows no tools is given none: they are told in the system message, calls and results in other messages.
    """
    if form.short_ids:
        return [_short(message) for message in messages]
    if form.told:
        return messages
    messages = _in_words(messages)
    return messages if use is None else _described(messages, use)


def with_prompt(messages: Messages, tool_prompt: str) -> Messages:
    """TGI's `tool_prompt`, which goes behind the last message."""
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n---\n{tool_prompt}"}]


def _told(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


def _described(messages: Messages, use: ToolUse) -> Messages:
    lines = "\n".join(json.dumps(_told(tool), ensure_ascii=False) for tool in use.tools)
    description = _DESCRIPTION.format(tools=lines)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": description}, *messages]
    first, *rest = messages
    content = f"{first['content']}\n\n{description}" if first["content"] else description
    return [{**first, "content": content}, *rest]


def _in_words(messages: Messages) -> Messages:
    found: Messages = []
    for i, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            said = [message["content"]] if message["content"] else []
            content = "\n".join([*said, *map(_written, calls)])
            found.append({"role": "assistant", "content": content})
        elif message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            # Templates want the sides to take turns, so the results of one answer are one message.
            if i and messages[i - 1]["role"] == message["role"] and found:
                found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n{result}"}
            else:
                found.append({"role": "user", "content": result})
        else:
            found.append(message)
    return found


def _written(call: Mapping[str, Any]) -> str:
    function = call["function"]
    written = {"name": function["name"], "arguments": function.get("arguments", {})}
    return f"<tool_call>\n{json.dumps(written, ensure_ascii=False)}\n</tool_call>"


def _short(message: dict[str, Any]) -> dict[str, Any]:
    """The message with ids of nine letters and digits; the same id always becomes the same."""
    found = dict(message)
    if isinstance(identity := message.get("tool_call_id"), str):
        found["tool_call_id"] = _short_id(identity)
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [{**call, "id": _short_id(str(call.get("id", "")))} for call in calls]
    return found


def _short_id(identity: str) -> str:
    if len(identity) == _ID_CHARS and identity.isascii() and identity.isalnum():
        return identity
    return hashlib.sha256(identity.encode()).hexdigest()[:_ID_CHARS]
