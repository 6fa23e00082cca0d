"""Tools a model may call, in the words of each API → one `ToolUse`. Knows their fields and limits; no template, no grammar."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .errors import Invalid, Unsupported

Words = tuple[str, str]
"""What an API calls the tools and the choice among them."""

MAX_TOOLS = 128
"""Most tools of a request to OpenAI's and TGI's routes (OpenAI's limit; Anthropic has none)."""
MAX_LEVELS = 200
"""Deepest schema of a tool, levels of its JSON: what templates, grammars and answers that repeat it can follow."""
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
"""OpenAI's alphabet, and what servers of the Model Context Protocol join names with."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS)
    """The JSON schema of its arguments, an object."""
    strict: bool = False
    """Whether a call must match the schema, also where the model chooses to make one."""
    param: str = "tools"
    """Where it stood."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools are offered, and whether one has to be called."""

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required"] = "auto"
    allowed: tuple[Tool, ...] = ()
    """Those of them that may be called."""
    parallel: bool = True
    """Whether several may be called in one answer."""
    legacy: bool = False
    """Whether they came as `functions`, of which one call is told as `function_call`."""

    @property
    def parameters(self) -> Mapping[str, Mapping[str, Any]]:
        """The schema of the arguments of each tool that may be called, by its name."""
        return {tool.name: tool.parameters for tool in self.allowed}

    @property
    def guided(self) -> bool:
        """Whether a grammar is needed to keep what was asked for."""
        return self.choice == "required" or not self.parallel or any(tool.strict for tool in self.allowed)


def chat_tools(tools: Any, choice: Any, parallel: bool | None) -> ToolUse | None:
    """Of a chat. Raises Invalid, Unsupported."""
    found = [_function(tool, f"tools[{i}]", nested=True) for i, tool in enumerate(_few(tools))]
    return _use(found, _chat_choice(choice, nested=True), parallel is not False)


def legacy_tools(functions: Any, choice: Any) -> ToolUse | None:
    """Of a chat that names them as OpenAI did at first: `functions` and `function_call`. Raises Invalid."""
    words = ("functions", "function_call")
    listed = _few(functions, words[0])
    found = [
        _function(_object(f, f"functions[{i}]"), f"functions[{i}]", nested=False)
        for i, f in enumerate(listed)
    ]
    if choice is None or choice in ("auto", "none"):
        picked = _Choice(choice or "auto")
    else:
        picked = _Choice("required", (_name_in(_object(choice, words[1]), words[1], nested=False),))
    use = _use(found, picked, False, words)
    return None if use is None else replace(use, legacy=True)


def response_tools(tools: Any, choice: Any, parallel: bool | None) -> ToolUse | None:
    """Of a response, where a function's fields stand in the tool itself. Raises Invalid, Unsupported."""
    found = [_function(tool, f"tools[{i}]", nested=False) for i, tool in enumerate(_few(tools))]
    return _use(found, _chat_choice(choice, nested=False), parallel is not False)


def message_tools(tools: Any, choice: Any) -> ToolUse | None:
    """Of Anthropic's messages. Raises Invalid, Unsupported."""
    found = [_anthropic(tool, f"tools[{i}]") for i, tool in enumerate(_list(tools))]
    if choice is None:
        return _use(found, _Choice("auto"), True)
    if not isinstance(choice, Mapping):
        raise Invalid("`tool_choice` must be an object", param="tool_choice")
    kind = choice.get("type")
    if kind not in ("auto", "any", "tool", "none"):
        raise Invalid("`tool_choice.type` must be auto, any, tool or none", param="tool_choice.type")
    names = (_text(choice.get("name"), "tool_choice.name"),) if kind == "tool" else None
    mode = {"any": "required", "tool": "required"}.get(kind, kind)
    return _use(found, _Choice(mode, names), not choice.get("disable_parallel_tool_use"))


@dataclass(frozen=True, slots=True)
class _Choice:
    mode: str
    names: tuple[str, ...] | None = None


def _use(
    tools: Sequence[Tool], choice: _Choice, parallel: bool, words: Words = ("tools", "tool_choice")
) -> ToolUse | None:
    """None where no tool may be called: then none is told of either, as TGI does."""
    name, choice_name = words
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        twice = next(tool for tool in tools if by_name[tool.name] is not tool)
        raise Invalid(f"`{name}` has two tools named {twice.name!r}", param=name)
    if choice.names is not None:
        missing = next((chosen for chosen in choice.names if chosen not in by_name), None)
        if missing is not None:
            raise Invalid(
                f"`{choice_name}` names {missing[:128]!r}, which is not in `{name}`", param=choice_name
            )
    if choice.mode == "none" or (choice.mode == "auto" and not tools):
        return None
    if not tools:
        raise Invalid(f"`{choice_name}` needs `{name}`", param=choice_name)
    allowed = tools if choice.names is None else [by_name[chosen] for chosen in choice.names]
    mode: Literal["auto", "required"] = "required" if choice.mode == "required" else "auto"
    # A tool that is named is called once.
    once = mode == "required" and choice.names is not None and len(choice.names) == 1
    return ToolUse(tuple(tools), mode, tuple(allowed), parallel and not once)


def _chat_choice(choice: Any, *, nested: bool) -> _Choice:
    if choice is None or isinstance(choice, str):
        # TGI takes a tool's name as it is.
        word = choice or "auto"
        return _Choice(word) if word in ("auto", "none", "required") else _Choice("required", (word,))
    if not isinstance(choice, Mapping):
        raise Invalid("`tool_choice` must be a text or an object", param="tool_choice")
    kind = choice.get("type", "function")
    if kind == "function":
        return _Choice("required", (_name_in(choice, "tool_choice", nested=nested),))
    if kind != "allowed_tools":
        raise Unsupported(
            f"`tool_choice.type` must be function or allowed_tools. Given: {str(kind)[:50]!r}",
            param="tool_choice.type",
        )
    allowed = choice.get("allowed_tools") if nested else choice
    place = "tool_choice.allowed_tools" if nested else "tool_choice"
    allowed = _object(allowed, place)
    mode = allowed.get("mode")
    if mode not in ("auto", "required"):
        raise Invalid(f"`{place}.mode` must be auto or required", param=f"{place}.mode")
    tools = [_object(tool, f"{place}.tools") for tool in _list(allowed.get("tools"), f"{place}.tools")]
    names = tuple(_name_in(tool, f"{place}.tools", nested=nested) for tool in tools)
    if not names:
        raise Invalid(f"`{place}.tools` must not be empty", param=f"{place}.tools")
    return _Choice(mode, names)


def _function(tool: Any, place: str, *, nested: bool) -> Tool:
    tool = _object(tool, place)
    kind = tool.get("type", "function")
    if kind != "function":
        raise Unsupported(
            f"`{place}` is of type {str(kind)[:50]!r}; this server takes functions", param=f"{place}.type"
        )
    function, place = (tool.get("function"), f"{place}.function") if nested else (tool, place)
    function = _object(function, place)
    given = function.get("parameters")
    # TGI's other name for it.
    return _tool(
        function, given if given is not None else function.get("arguments"), f"{place}.parameters", place
    )


def _anthropic(tool: Any, place: str) -> Tool:
    tool = _object(tool, place)
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise Unsupported(
            f"`{place}` is of type {str(kind)[:50]!r}; this server takes your own", param=f"{place}.type"
        )
    return _tool(tool, tool.get("input_schema"), f"{place}.input_schema", place)


def _tool(function: Mapping[str, Any], parameters: Any, schema_place: str, place: str) -> Tool:
    name = _text(function.get("name"), f"{place}.name")
    if not _NAME.fullmatch(name):
        raise Invalid(
            f"`{place}.name` must be 1 to 128 letters, digits, or one of _ - . : /. Given: {name[:128]!r}",
            param=f"{place}.name",
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise Invalid(f"`{place}.description` must be a text", param=f"{place}.description")
    tool = Tool(name, description or "", strict=function.get("strict") is True, param=schema_place)
    if not parameters:
        return tool
    parameters = _object(parameters, schema_place)
    if parameters.get("type", "object") != "object":
        raise Invalid(f"`{schema_place}` must be the schema of an object", param=schema_place)
    if (levels := _levels(parameters)) > MAX_LEVELS:
        raise Invalid(
            f"`{schema_place}` is nested {levels} levels deep; at most {MAX_LEVELS} are taken",
            param=schema_place,
        )
    required = parameters.get("required")
    if required is not None and not (
        isinstance(required, list) and all(isinstance(k, str) for k in required)
    ):
        raise Invalid(
            f"`{schema_place}.required` must be a list of the names of properties. Given: {str(required)[:50]}",
            param=f"{schema_place}.required",
        )
    return replace(tool, parameters={"type": "object", **parameters})


def _levels(value: Any) -> int:
    """How many levels JSON has."""
    found, level = 0, [value]
    while level:
        found += 1
        level = [inner for outer in level for inner in _inside(outer)]
    return found


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def _name_in(holder: Mapping[str, Any], place: str, *, nested: bool) -> str:
    if nested:
        holder, place = _object(holder.get("function"), f"{place}.function"), f"{place}.function"
    return _text(holder.get("name"), f"{place}.name")


def _list(value: Any, place: str = "tools") -> Sequence[Any]:
    if value is not None and not isinstance(value, list):
        raise Invalid(f"`{place}` must be a list", param=place)
    return value or []


def _few(tools: Any, place: str = "tools") -> Sequence[Any]:
    listed = _list(tools, place)
    if len(listed) > MAX_TOOLS:
        raise Invalid(f"`{place}` takes at most {MAX_TOOLS} tools. Given: {len(listed)}", param=place)
    return listed


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Invalid(f"`{place}` must be an object", param=place)
    return value


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise Invalid(f"`{place}` must be a text, and not empty", param=place)
    return value
