"""Where a model keeps its tokenizer: finds and reads the files of a Hugging Face directory, or of a GGUF file.

Knows file names and keys; not what is done with a tokenizer. transformers is imported only where there is no
tokenizer.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from .chat import named_templates, read_object, templates_of_directory
from .errors import TokenizerError
from .gguf_file import GgufFile
from .gguf_tokenizer import end_ids, tokenizer_from_gguf
from .unadvised import unadvised

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_UNLIMITED = 10**9
"""transformers writes a huge model_max_length for none."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a model's files say about its text."""

    tokenizer: Tokenizer
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates by name; `default` is the one for chats without tools."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token` … as templates see them."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end a text; empty means the id of `eos_token`."""
    max_context: int | None = None
    """Tokens the model was made for."""
    response_template: Any = None
    """How answers are to be read, if that is declared; as it stands there, unchecked."""


def read_gguf(path: Path) -> TokenizerFiles:
    """The tokenizer inside a GGUF file. Raises TokenizerError, or CheckpointError if it is no whole GGUF file."""
    metadata = GgufFile(path).metadata
    tokenizer = tokenizer_from_gguf(metadata, str(path))
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    ids |= {"unk": metadata.get("tokenizer.ggml.unknown_token_id")}
    ids |= {"pad": metadata.get("tokenizer.ggml.padding_token_id")}
    prefix = "tokenizer.chat_template"
    templates = named_templates(metadata.get(prefix), path)
    templates |= {
        key.removeprefix(f"{prefix}."): text
        for key, text in metadata.items()
        if key.startswith(f"{prefix}.") and isinstance(text, str)
    }
    return TokenizerFiles(
        tokenizer,
        templates,
        {
            f"{name}_token": token
            for name, number in ids.items()
            if name in _SPECIAL and number is not None and (token := tokenizer.id_to_token(number))
        },
        end_ids(metadata),
        metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    )


def read_directory(directory: Path) -> TokenizerFiles:
    """The tokenizer of a Hugging Face directory. Raises TokenizerError naming the file that is wrong."""
    path = directory / "tokenizer_config.json"
    config = read_object(path) if path.is_file() else {}
    special = {**_special_tokens(directory / "special_tokens_map.json"), **_texts(config)}
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
            raise TokenizerError(f"{file}: cannot be read: {error}") from error
        _frame_like_llama(tokenizer, config)
    else:
        tokenizer = _through_transformers(directory)
    limit = config.get("model_max_length")
    return TokenizerFiles(
        tokenizer,
        templates_of_directory(directory, config),
        special,
        _ends(directory / "generation_config.json", tokenizer, special),
        max_context=int(limit) if isinstance(limit, int | float) and 0 < limit < _UNLIMITED else None,
        response_template=config.get("response_template"),
    )


def with_config(files: TokenizerFiles, path: Path) -> TokenizerFiles:
    """The same with the chat templates and their special tokens of another tokenizer_config.json, and its response template if
    it has one. Raises TokenizerError."""
    config = read_object(path)
    templates = named_templates(config.get("chat_template"), path)
    if not templates and "response_template" not in config:
        raise TokenizerError(f"{path}: has no chat_template and no response_template, so it changes nothing")
    return replace(
        files,
        templates=templates or files.templates,
        special_tokens={**files.special_tokens, **_texts(config)},
        response_template=config.get("response_template", files.response_template),
    )


def _ends(path: Path, tokenizer: Tokenizer, special: Mapping[str, str]) -> tuple[int, ...]:
    """Ids that end a text: all that generation_config.json names, and the tokenizer's own. Chat models have several."""
    named = read_object(path).get("eos_token_id") if path.is_file() else None
    own = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    ids = [*(named if isinstance(named, list) else [named]), own]
    return tuple(dict.fromkeys(number for number in ids if isinstance(number, int)))


def _special_tokens(path: Path) -> dict[str, str]:
    return _texts(read_object(path)) if path.is_file() else {}


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token …, each written as a text or as an object with `content`."""
    found: dict[str, str] = {}
    for name in _SPECIAL:
        value = config.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[f"{name}_token"] = text
    return found


def _frame_like_llama(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """transformers' Llama class puts bos and eos round a text as tokenizer_config.json says, whatever tokenizer.json does."""
    flags = {name: config.get(f"add_{name}_token") for name in ("bos", "eos")}
    if (
        config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast")
        or None in flags.values()
    ):
        return
    tokens = _texts(config)
    first, last = (tokens.get(f"{name}_token") if flag else None for name, flag in flags.items())
    named = {t: tokenizer.token_to_id(t) for t in (first, last) if t}
    if None in named.values():
        raise TokenizerError(f"tokenizer_config.json: {', '.join(named)} is not in tokenizer.json")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*([first] if first else []), "$A", *([last] if last else [])],
        special_tokens=list(named.items()),
    )


def _through_transformers(directory: Path) -> Tokenizer:
    """A tokenizer in one of the older formats, converted by transformers."""
    with unadvised():
        from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # missing optional packages, odd files: transformers says which
        raise TokenizerError(f"{directory}: no tokenizer can be read: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise TokenizerError(
            f"{directory}: {type(loaded).__name__} has no tokenizer.json and cannot be converted"
        )
    return backend
