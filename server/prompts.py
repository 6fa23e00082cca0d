"""Texts → token ids within the limits, off the event loop. The last stop before a request is the engine's business."""

from collections.abc import Callable, Sequence

from ..models.errors import TokenizerError
from .backend import Serving
from .errors import Invalid
from .front import Front
from .validate import surely_longer
from .validate_openai import too_long_unread
from .validate_tgi import check_inputs, too_long


async def native_ids(front: Front, serving: Serving, inputs: str, truncate: int | None) -> list[int]:
    """The ids of a native prompt. Raises Invalid."""
    info = serving.info
    check_inputs(inputs, truncate, info)
    if truncate is None and surely_longer(inputs, info.max_input_tokens, front.config):
        raise too_long(info, len(inputs) // front.config.max_token_bytes, at_least=True)
    ids = await _encode(front, serving.tokenizer.encode, inputs)
    if truncate is None or len(ids) <= truncate:
        return ids
    if truncate > 1 and serving.tokenizer.is_special(ids[0]):
        # The beginning-of-sequence token is no part of what the client wrote; models go astray without it.
        return [ids[0], *ids[len(ids) - truncate + 1 :]]
    return ids[len(ids) - truncate :]


async def openai_ids(front: Front, serving: Serving, text: str, *, add_special_tokens: bool) -> list[int]:
    """The ids of a prompt text. Raises Invalid, TooLong."""

    def encode(text: str) -> list[int]:
        return serving.tokenizer.encode(text, add_special_tokens)

    return await _ids(front, serving, text, "prompt", encode)


async def chat_ids(front: Front, serving: Serving, rendered: str, place: str) -> list[int]:
    """The ids of a rendered conversation, which its sender calls `place`. Raises Invalid, TooLong."""
    return await _ids(front, serving, rendered, place, serving.tokenizer.encode_chat)


async def _ids(
    front: Front, serving: Serving, text: str, param: str, encode: Callable[[str], list[int]]
) -> list[int]:
    if surely_longer(text, serving.info.max_input_tokens, front.config):
        raise too_long_unread(serving.info, len(text), param)
    ids = await _encode(front, encode, text)
    if not text or not ids:
        raise Invalid(f"`{param}` must not be empty", param=param)
    return ids


def given_ids(serving: Serving, ids: Sequence[int]) -> list[int]:
    """Ids a client sent instead of a text. Raises Invalid."""
    if not ids:
        raise Invalid("`prompt` must not be empty", param="prompt")
    if min(ids) < 0 or max(ids) >= serving.info.vocab_size:
        raise Invalid(f"`prompt` has a token id outside 0 … {serving.info.vocab_size - 1}", param="prompt")
    return list(ids)


async def _encode(front: Front, encode: Callable[[str], list[int]], text: str) -> list[int]:
    try:
        return await front.workers.run(encode, text)
    except TokenizerError as error:
        raise Invalid(f"tokenizer error {error}") from error
