"""Chat templates: where a model keeps them, and which one is applied. Knows messages, no ids."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import TemplateTooCostly, TokenizerError
from .template_processes import USUAL, TemplateLimits, TemplateProcesses

logger = logging.getLogger(__name__)

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of templates that mean something; a model may carry others."""


SET = (
    "messages", "tools", "add_generation_prompt", "continue_final_message", "conversations", "chat_template",
    "return_assistant_tokens_mask", "self",
)  # fmt: skip
"""Names that rendering sets or that Jinja and transformers mean something else by, beside the special tokens."""


class ChatTemplates:
    """The templates of one model, by name, and the strings they may use (bos_token, eos_token …)."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self.special_tokens = dict(special_tokens)
        self._variables: dict[str, frozenset[str]] = {}
        self._processes = TemplateProcesses()

    @property
    def default(self) -> str | None:
        """The template of a chat without tools."""
        return self.templates.get(DEFAULT)

    @property
    def with_tools(self) -> str | None:
        """The template of a chat with tools."""
        return self.templates.get(TOOL_USE, self.default)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        limits: TemplateLimits = USUAL,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Raises:
            TokenizerError: there is no template, or the template refused; with the template's own words.
            TemplateTooCostly: it would have taken more than `limits`.
        """
        template = self._choose(bool(tools))
        try:
            return self._processes.ask(
                "render",
                limits,
                template=template,
                messages=[_with_thinking(message) for message in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={**self.special_tokens, **variables},
            )
        except ValueError as error:
            raise TokenizerError(f"the chat template refused the messages: {error}") from error

    def variables(self, *, tools: bool = False, limits: TemplateLimits = USUAL) -> frozenset[str]:
        """Names that the template of a chat (with tools, or without) reads and `render` does not set by itself.

        Raises TokenizerError if there is no template, or it is none, TemplateTooCostly beyond `limits`.
        """
        template = self._choose(tools)
        if template not in self._variables:
            try:
                read = json.loads(self._processes.ask("variables", limits, template=template))
            except ValueError as error:
                raise TokenizerError(f"the chat template cannot be read: {error}") from error
            self._variables[template] = frozenset(read) - {*SET, *self.special_tokens}
        return self._variables[template]

    def warm(self) -> None:
        """Start what applies the template and compile it, so that the first chat does not wait for that. A template that is none,
        or takes too much for a word, is warned of."""
        if self.default is None:
            return
        useless: TokenizerError | None = None
        try:
            self.variables()
        except TokenizerError as error:
            useless = error
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except TemplateTooCostly as error:
            useless = error
        except TokenizerError:
            pass  # it may want other messages; whoever asks for a chat is told
        if useless is not None:
            logger.warning("chats will be refused, texts will not: %s", useless)

    def _choose(self, tools: bool) -> str:
        name = TOOL_USE if tools and TOOL_USE in self.templates else DEFAULT
        if name not in self.templates:
            others = f" (it has others: {', '.join(sorted(self.templates))})" if self.templates else ""
            raise TokenizerError(f"this model has no chat template{others}; send it text, not messages")
        return self.templates[name]


def _with_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its thinking under both names that templates read. transformers does so since its version 5."""
    thought = message.get("reasoning_content")
    return message if thought is None else {"thinking": thought, **message}


def templates_of_directory(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """All templates of a model directory; where there are several of a name, transformers' order of preference.

    Args:
        directory: where chat_template.jinja, additional_chat_templates/ and chat_template.json may lie.
        config: tokenizer_config.json.
    """
    found = named_templates(config.get("chat_template"), directory / "tokenizer_config.json")
    if (path := directory / "chat_template.json").is_file():
        found |= named_templates(read_object(path).get("chat_template"), path)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read_text(path)
    if (path := directory / "chat_template.jinja").is_file():
        found[DEFAULT] = _read_text(path)
    return found


def named_templates(value: object, where: Path | str) -> dict[str, str]:
    """One template, a list of {name, template}, a mapping of them, or none."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(template, str) for name, template in value.items()
    ):
        return dict(value)
    raise TokenizerError(f"{where}: chat_template is neither a text nor a list of named texts")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises TokenizerError naming it."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds no JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
