"""The rules of Anthropic's parameters, where they are not OpenAI's. Knows no prompt."""

from ..engine import EngineInfo
from .config import ServerConfig
from .errors import Invalid, Unsupported
from .forms import Form, text_format
from .schema_anthropic import CountBody, MessagesBody
from .unsupported import MESSAGES, refuse
from .validate import Checked
from .validate_openai import between, sampling_of, stops_of, terms_of

THINKING = ("enabled", "adaptive", "between_tools", "disabled")


def check_count(body: CountBody) -> Form | None:
    """What a prompt cannot be made of; the form that its answer is asked for in. Raises Invalid, Unsupported."""
    refuse(body, MESSAGES)
    if body.thread is not None:
        # The client's tool runner opens one unasked; told so in this word, it sends whole conversations instead.
        raise Unsupported(
            "`thread` is not supported by this server, which stores nothing: send the whole conversation",
            param="thread",
            code="thread_unsupported_request",
        )
    if body.thinking is not None and body.thinking.type not in THINKING:
        raise Invalid(f"`thinking.type` must be one of {', '.join(THINKING)}", param="thinking.type")
    given = body.output_config.format if body.output_config else None
    former = body.output_format
    if given is None:
        return text_format(former, "output_format")
    if former not in (None, given):
        raise Invalid("`output_format` and `output_config.format` exclude each other", param="output_format")
    return text_format(given, "output_config.format")


def check_messages(
    body: MessagesBody, config: ServerConfig, info: EngineInfo, eos_ids: tuple[int, ...]
) -> Checked:
    """A message's parameters → `Checked`. Raises Invalid, Unsupported."""
    form = check_count(body)
    return Checked(
        sampling=sampling_of(body, info, eos_ids),
        max_tokens=between("max_tokens", body.max_tokens, 1, None),
        stops=stops_of(body.stop_sequences, config, "stop_sequences"),
        include_stop=False,
        terms=terms_of(body),
        form=form,
    )
