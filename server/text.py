"""What this room needs of a tokenizer, and the threads it runs in. Knows strings and ids; no HTTP, no engine.

Tokenising a long text takes long enough to be felt by every stream of the process, so it never runs on the event loop.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from ..models.template_processes import TemplateLimits

T = TypeVar("T")


class TokenStream(Protocol):
    """The text of one sequence, piece by piece, never half a character."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """What is left at the end: replacement characters for an incomplete one, or nothing."""
        ...


class TextTokenizer(Protocol):
    """Text to ids and back, and the chat template. Safe to call from several threads."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def chat_template(self) -> str | None:
        """The template `apply_chat` follows when there are no tools."""
        ...

    @property
    def tool_template(self) -> str | None:
        """The one it follows when there are."""
        ...

    @property
    def response_template(self) -> Any:
        """How answers are to be read, as the model's files declare it, unchecked; None if they do not."""
        ...

    def template_variables(self, *, tools: bool = False, limits: TemplateLimits = ...) -> frozenset[str]:
        """What a caller of `apply_chat`, with tools or without, may set. Raises TokenizerError, TemplateTooCostly."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_chat(self, text: str) -> list[int]:
        """Ids of what `apply_chat` made, in which people's words are no control tokens."""
        ...

    def encode_chat_offsets(self, text: str) -> tuple[str, Sequence[tuple[int, int, int]]]:
        """The same text for people to see, and `encode_chat`'s ids, each with its bytes of that."""
        ...

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> Sequence[tuple[int, int, int]]:
        """(id, start, end) of every token; offsets in UTF-8 bytes, 0 and 0 for a token that is not in the text."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def stream(self, prompt_ids: Sequence[int] = ()) -> TokenStream:
        """Incremental decoding of what follows a prompt."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token's text by itself; special tokens show, half characters are replaced."""
        ...

    def is_special(self, token_id: int) -> bool: ...

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        limits: TemplateLimits = ...,
        **kwargs: Any,
    ) -> str:
        """Raises TokenizerError, TemplateTooCostly."""
        ...


def special_id(tokenizer: TextTokenizer, text: str) -> int | None:
    """The control token that is this text, if there is one."""
    ids = tokenizer.encode(text, False)
    known = len(ids) == 1 and tokenizer.is_special(ids[0]) and tokenizer.token_text(ids[0]) == text
    return ids[0] if known else None


class TextWorkers:
    """A few threads for tokenising and templates; more work than threads waits its turn."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="xlane-text")

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """The result of a call made on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def close(self) -> None:
        """Let running calls end, start no others."""
        self._threads.shutdown(wait=False, cancel_futures=True)
