"""A conversation with checked parameters → a job of one prompt: what every chat API does. Knows no bodies."""

from dataclasses import replace

from .backend import Serving
from .chat import Conversation, render
from .front import Front
from .guide import grammar_of
from .headers import Clock
from .openai_run import Job, Prompt, plan
from .parting import Parting
from .prompts import chat_ids
from .validate import Checked, room_left
from .validate_openai import check_length


async def conversation_ids(front: Front, serving: Serving, conversation: Conversation) -> Prompt:
    """The prompt of a conversation, without tokens to generate. Raises Invalid, TooLong, TemplateFailed."""
    rendered = await render(front, serving, conversation)
    ids = await chat_ids(front, serving, rendered.text, conversation.place)
    return Prompt(rendered.text, ids, 0, rendered.thinking)


async def converse(
    front: Front,
    serving: Serving,
    conversation: Conversation,
    checked: Checked,
    clock: Clock,
    *,
    wanted: str = "max_tokens",
    cut: bool = False,
) -> Job:
    """The job of a conversation. Raises Invalid, TooLong, TemplateFailed.

    Args:
        front: what the routes share.
        serving: what answers.
        conversation: what was said.
        checked: how to answer.
        clock: when the request came.
        wanted: what its sender calls the number of tokens to generate.
        cut: take that number for a wish, of which as much is granted as fits.
    """
    prompt = await conversation_ids(front, serving, conversation)
    max_tokens = checked.max_tokens
    if cut and max_tokens is not None:
        max_tokens = min(max_tokens, max(1, room_left(len(prompt.ids), serving.info)))
    max_tokens = check_length(len(prompt.ids), max_tokens, serving.info, conversation.place, wanted)
    prompt = Prompt(prompt.text, prompt.ids, max_tokens, prompt.thinking)
    tools = conversation.tools
    grammar = await grammar_of(front, serving, checked.form, tools, chat=True, opened=prompt.thinking)
    checked = replace(checked, grammar=grammar)
    parting = Parting(serving, chat=True, thinking=front.parts_thinking, tools=tools)
    return plan(front, parting, [prompt], checked, clock)
