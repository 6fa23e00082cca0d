"""A tokenizer anyone can run in the head: a token is a byte, and a few more are special. Fits `server.text.TextTokenizer`."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from xlane.models.errors import TokenizerError
from xlane.models.template_processes import USUAL, TemplateLimits

BOS, EOS, END_OF_TURN = 256, 257, 258
SPECIAL = {BOS: "<bos>", EOS: "<eos>", END_OF_TURN: "<eot>"}
VOCAB_SIZE = 259


class ByteStream:
    """Incremental UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id]))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class ByteTokenizer:
    """One token per UTF-8 byte; special tokens cannot be typed."""

    eos_ids: tuple[int, ...] = (EOS, END_OF_TURN)
    vocab_size = VOCAB_SIZE
    chat_template: str | None = None
    tool_template: str | None = None
    response_template: Any = None

    def template_variables(self, *, tools: bool = False, limits: TemplateLimits = USUAL) -> frozenset[str]:
        return frozenset({"enable_thinking", "thinking", "documents"})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def encode_chat(self, text: str) -> list[int]:
        return self.encode(text, False)

    def encode_chat_offsets(self, text: str) -> tuple[str, list[tuple[int, int, int]]]:
        return text, self.encode_offsets(text, False)

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int, int]]:
        spans = [(byte, i, i + 1) for i, byte in enumerate(text.encode())]
        return [(BOS, 0, 0)] * add_special_tokens + spans

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [i for i in ids if not (skip_special_tokens and i in SPECIAL)]
        return b"".join(SPECIAL[i].encode() if i in SPECIAL else bytes([i]) for i in known).decode(
            errors="replace"
        )

    def stream(self, prompt_ids: Sequence[int] = ()) -> ByteStream:
        return ByteStream()

    def token_text(self, token_id: int) -> str:
        return SPECIAL[token_id] if token_id in SPECIAL else bytes([token_id]).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in SPECIAL

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        limits: TemplateLimits = USUAL,
        **kwargs: Any,
    ) -> str:
        """`[role]content|` per message; refuses the system message "refuse me"."""
        if messages[0] == {"role": "system", "content": "refuse me"}:
            raise TokenizerError("the chat template refused the messages: no system message, please")
        extra = "".join(f"{{{name}={value}}}" for name, value in sorted(kwargs.items()))
        text = extra + "".join(f"[{m['role']}]{m['content']}|" for m in messages)
        if continue_final_message:
            return text.removesuffix("|")
        return text + "[assistant]" * add_generation_prompt


class ThinkingTokenizer(ByteTokenizer):
    """Of a model that thinks: its template opens the thinking itself, unless `opens` or `enable_thinking` is false."""

    chat_template = "{{ ... }}<think>"

    def __init__(self, opens: bool = True) -> None:
        self._opens = opens

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        limits: TemplateLimits = USUAL,
        **kwargs: Any,
    ) -> str:
        text = super().apply_chat(messages, tools, add_generation_prompt, continue_final_message, **kwargs)
        opens = self._opens and add_generation_prompt and kwargs.get("enable_thinking", True)
        return text + "<think>\n" * opens
