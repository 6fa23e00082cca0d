"""Text to ids and back, and the chat template of a model, from a Hugging Face directory or a GGUF file. No jax here.

All kinds become one `tokenizers.Tokenizer`; transformers is loaded only for directories without a tokenizer.json. Safe
to use from several threads: nothing changes after construction but caches.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer

from .chat import ChatTemplates
from .detokenize import ByteStream, TextStream, WindowStream, token_table
from .errors import TokenizerError
from .template_processes import USUAL, TemplateLimits
from .tokenizer_files import TokenizerFiles, read_directory, read_gguf, with_config
from .typed import BREAK, TypedText

__all__ = ["TextStream", "TextTokenizer", "TokenSpan", "TokenizerFiles"]


class TokenSpan(NamedTuple):
    """One token and where it lies in the text, in UTF-8 bytes; 0, 0 for a token that is not in it."""

    id: int
    start: int
    stop: int


class TextTokenizer:
    """The text side of one model."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Wrap what was read; `from_path` reads it. The tokenizer is owned from now on: it never truncates or pads."""
        files.tokenizer.no_truncation()
        files.tokenizer.no_padding()
        self._tokenizer = files.tokenizer
        self._chat = ChatTemplates(files.templates, files.special_tokens)
        self.response_template = files.response_template
        """How answers are to be read (transformers' `response_template`), as the model's files declare it, unchecked."""
        added = files.tokenizer.get_added_tokens_decoder()
        self._special = frozenset(number for number, token in added.items() if token.special)
        self._typed = TypedText(files.tokenizer)
        self._table = token_table(files.tokenizer)
        self.max_context = files.max_context
        """Tokens the tokenizer's files say the model was made for, if they do."""
        eos = files.tokenizer.token_to_id(self.eos_token) if self.eos_token else None
        self.eos_ids: tuple[int, ...] = files.eos_ids or (() if eos is None else (eos,))
        """Ids that end a text, as far as the tokenizer knows; the model's configuration may name more."""
        self.vocab_size: int = files.tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_path(
        cls,
        path: Path | str,
        kind: Literal["directory", "gguf"] | None = None,
        config: Path | str | None = None,
    ) -> "TextTokenizer":
        """Read a model's tokenizer. Raises TokenizerError if there is none that can be read.

        Args:
            path: a Hugging Face directory or a GGUF file.
            kind: which of the two; default by looking.
            config: another tokenizer_config.json, whose chat template goes before the model's.
        """
        path = Path(path)
        kind = kind or ("directory" if path.is_dir() else "gguf")
        files = read_gguf(path) if kind == "gguf" else read_directory(path)
        return cls(files if config is None else with_config(files, Path(config)))

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer itself, for libraries that need one. Not to be changed."""
        return self._tokenizer

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a text."""
        return self._chat.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a text."""
        return self._chat.special_tokens.get("eos_token")

    @property
    def chat_template(self) -> str | None:
        """The template of a chat without tools, if the model has one."""
        return self._chat.default

    @property
    def tool_template(self) -> str | None:
        """The template of a chat with tools, if the model has one."""
        return self._chat.with_tools

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Other threads run meanwhile."""
        # encode() holds the interpreter lock, encode_batch() does not.
        batch = self._tokenizer.encode_batch_fast([_valid(text)], add_special_tokens=add_special_tokens)
        return batch[0].ids

    def encode_chat(self, text: str) -> list[int]:
        """Ids of what `apply_chat` made: the template's control tokens are tokens, those that people typed are text."""
        pieces = [_valid(piece) for piece in text.split(BREAK)]
        batch = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return [number for encoding in batch for number in encoding.ids]

    def encode_chat_offsets(self, text: str) -> tuple[str, list[TokenSpan]]:
        """What `apply_chat` made as people may see it, and `encode_chat`'s ids with the bytes of that text they stand for."""
        spans: list[TokenSpan] = []
        begin, pieces = 0, text.split(BREAK)
        for piece in pieces:
            found = self.encode_offsets(piece, add_special_tokens=False)
            spans += [TokenSpan(number, begin + start, begin + stop) for number, start, stop in found]
            begin += len(piece.encode())
        return "".join(pieces), spans

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> list[TokenSpan]:
        """Ids of a text, each with the bytes of the text it stands for (whole characters)."""
        batch = self._tokenizer.encode_batch([_valid(text)], add_special_tokens=add_special_tokens)
        byte_at = [0]
        for character in text:
            byte_at.append(byte_at[-1] + len(character.encode()))
        return [
            TokenSpan(number, byte_at[start], byte_at[stop])
            for number, (start, stop) in zip(batch[0].ids, batch[0].offsets)
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        """Decode what follows a prompt, token by token. After an empty prompt the pieces together are `decode`'s text."""
        skip = self._special if skip_special_tokens else frozenset[int]()
        if self._table is not None:
            return ByteStream(self._table, skip, prompt_ids)
        return WindowStream(self._tokenizer, skip, prompt_ids)

    def token_text(self, token_id: int) -> str:
        """The text of one token in the middle of a text; special tokens show, half characters are replaced."""
        if self._table is not None:
            return self._table[token_id].decode(errors="replace")
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def is_special(self, token_id: int) -> bool:
        """Is this a control token, left out of texts?"""
        return token_id in self._special

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        limits: TemplateLimits = USUAL,
        **kwargs: Any,
    ) -> str:
        """A conversation as text, the template's special tokens included, for `encode_chat`.

        A message that the model is to continue is taken as it is: whoever begins it may begin it with what the model writes.

        Raises:
            TokenizerError: there is no template, or it refused the messages, with its own words.
            TemplateTooCostly: it would have taken more than `limits`.
        """
        begun = list(messages[-1:]) if continue_final_message else []
        return self._chat.render(
            [*self._typed.broken(messages[: len(messages) - len(begun)]), *begun],
            self._typed.broken(tools),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            limits=limits,
            **kwargs,
        )

    def template_variables(self, *, tools: bool = False, limits: TemplateLimits = USUAL) -> frozenset[str]:
        """What a caller of `apply_chat` may set: all that the template reads and that is not set anyway.

        Raises TokenizerError if there is no template, TemplateTooCostly beyond `limits`.
        """
        return self._chat.variables(tools=tools, limits=limits)

    def warm(self) -> None:
        """Do now what the first chat would wait for (starting what applies templates); call it from a thread."""
        self._chat.warm()


def unmarked(text: str) -> str:
    """What `apply_chat` made, as people see it: without the marks that keep their words from being control tokens."""
    return text.replace(BREAK, "")


def _valid(text: str) -> str:
    """Lone surrogates (JSON can carry them) are no text and would fail deep inside."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text is not valid Unicode: {error}") from None
    return text
