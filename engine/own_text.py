"""Text that a model writes by itself, to learn from: asked nothing, it makes up the question, then answers it (Xu et al. 2024).

Knows token ids and an engine; neither what a chat looks like as text nor what is learnt from it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .local import EngineCore, LocalClient
from .request import Request, SamplingParams

QUESTION_TOKENS, ANSWER_TOKENS = 64, 192
"""Longest of each."""
TEMPERATURES = (0.0, 0.7)
"""Of answers, in turns: what most servers are asked for. Questions are drawn at 1, so that they differ."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """How a chat of one question is put together, in token ids."""

    opening: tuple[int, ...]
    """Comes before the question."""
    turn: tuple[int, ...]
    """Comes between question and answer. Empty for a model without a chat: then a text is one piece."""
    stop_ids: tuple[int, ...]
    """End a question, and an answer."""


class Text(NamedTuple):
    """Token ids to learn from."""

    tokens: Sequence[int]
    given: int
    """How many of them, in front, the model was given: what it says after those is to be guessed."""


async def write_texts(
    engine: EngineCore, dialogue: Dialogue, tokens: int, progress: Callable[[int, int], None]
) -> list[Text]:
    """Texts with about so many tokens of answers in all. `progress(done, total)` counts them."""
    client, lanes, texts, done = LocalClient(engine), engine.info.lanes, list[Text](), 0

    async def say(name: str, prompt: tuple[int, ...], most: int, temperature: float, seed: int) -> list[int]:
        sampling = SamplingParams(
            max_tokens=most, min_tokens=2, temperature=temperature, seed=seed, stop_ids=dialogue.stop_ids
        )
        request = Request(id=name, prompt_ids=prompt, sampling=sampling)
        return [token.id async for output in client.submit(request) for token in output.tokens]

    async def write(writer: int) -> None:
        nonlocal done
        number = writer
        while done < tokens:
            prompt, temperature = dialogue.opening, 1.0
            if dialogue.turn:
                question = await say(f"question-{number}", dialogue.opening, QUESTION_TOKENS, 1.0, number)
                # Without what ended it: the turn brings that along.
                asked = [token for token in question if token not in dialogue.stop_ids]
                prompt += (*asked, *dialogue.turn)
                temperature = TEMPERATURES[number // lanes % len(TEMPERATURES)]
            answer = await say(f"answer-{number}", prompt, ANSWER_TOKENS, temperature, number)
            texts.append(Text([*prompt, *answer], len(prompt)))
            done += len(answer)
            progress(min(done, tokens), tokens)
            number += lanes

    await asyncio.gather(*(write(writer) for writer in range(lanes)))
    return texts
