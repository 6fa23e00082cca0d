"""A stream says what the whole answer says: 210 requests drawn at random over four APIs' parameters, some at once, through
HTTP; against hand arithmetic and against the demo model."""

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

REQUESTS = 210
AT_ONCE = 8
TEXTS = ["a", "one two", "Say: é日🙂.", "1, 2, 3, 4,", "The capital of France is", "x" * 60, "def f(x):\n"]
STOPS = ["e", "d", " the", "\n", "xyz", "fgh", ".", "🙂"]

pytestmark = pytest.mark.clients


@dataclass(frozen=True)
class Case:
    path: str
    body: dict[str, Any]


def _sampling(chance: random.Random) -> dict[str, Any]:
    """What all APIs call alike. A seed goes with every request that is not greedy, so that it can be asked twice."""
    fields: dict[str, Any] = {}
    if chance.random() < 0.6:
        fields |= {"temperature": chance.choice([0.3, 0.8, 1.0, 1.7]), "seed": chance.randrange(2**32)}
        if chance.random() < 0.4:
            fields["top_p"] = chance.choice([0.3, 0.9, 0.99])
        if chance.random() < 0.3:
            fields["top_k"] = chance.choice([1, 5, 40])
    if chance.random() < 0.3:
        fields["repetition_penalty"] = chance.choice([0.9, 1.2, 1.5])
    if chance.random() < 0.3:
        fields["frequency_penalty"] = chance.choice([-0.5, 0.4, 1.0])
    if chance.random() < 0.5:
        fields["stop"] = chance.sample(STOPS, chance.randrange(1, 4))
    return fields


def _tgi(chance: random.Random) -> Case:
    fields = {"max_new_tokens": chance.randrange(1, 9), "details": True, **_sampling(chance)}
    if chance.random() < 0.3:
        fields["top_n_tokens"] = chance.randrange(1, 5)
    if chance.random() < 0.3:
        fields["return_full_text"] = chance.random() < 0.5
    if "temperature" in fields:
        fields["do_sample"] = True
    return Case("/generate", {"inputs": chance.choice(TEXTS), "parameters": fields})


def _openai(chance: random.Random) -> dict[str, Any]:
    fields = {"max_tokens": chance.randrange(1, 9), "temperature": 0, **_sampling(chance)}
    if chance.random() < 0.3:
        fields["n"] = chance.randrange(2, 4)
        fields |= {"temperature": 0.9, "seed": chance.randrange(2**32)}
    if chance.random() < 0.3:
        fields["presence_penalty"] = chance.choice([-1.0, 0.7])
    return fields


def _completions(chance: random.Random) -> Case:
    fields = _openai(chance)
    if chance.random() < 0.3:
        fields["logprobs"] = chance.randrange(5)
    prompts = chance.sample(TEXTS, 2) if chance.random() < 0.2 else chance.choice(TEXTS)
    return Case("/v1/completions", {"prompt": prompts, **fields})


def _chat(chance: random.Random) -> Case:
    fields = _openai(chance)
    if chance.random() < 0.4:
        fields |= {"logprobs": True, "top_logprobs": chance.randrange(5)}
    messages = [{"role": "user", "content": chance.choice(TEXTS)}]
    if chance.random() < 0.4:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    if chance.random() < 0.3:
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Go on."}]
    if chance.random() < 0.2:
        messages.append({"role": "assistant", "content": "Well, it"})
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return Case("/v1/chat/completions", {"messages": messages, **fields})


def drawn(count: int) -> list[Case]:
    """The same requests at every run."""
    chance = random.Random(20261125)
    make: list[Callable[[random.Random], Case]] = [_tgi, _completions, _chat]
    return [make[number % len(make)](chance) for number in range(count)]


Answer = list[tuple[str, str | None, list[float]]]
"""Of each choice: text, reason, log-probabilities."""


def whole(case: Case, body: Any) -> Answer:
    """What a complete answer says."""
    if case.path == "/generate":
        details = body["details"]
        scores = [token["logprob"] for token in details["tokens"]]
        return [(body["generated_text"], details["finish_reason"], scores)]
    chat = case.path.endswith("chat/completions")
    return [
        (
            choice["message"]["content"] if chat else choice["text"],
            choice["finish_reason"],
            _scores(choice["logprobs"]),
        )
        for choice in sorted(body["choices"], key=lambda choice: choice["index"])
    ]


def streamed(case: Case, text: str) -> Answer:
    """What a stream's events say together."""
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert not [event for event in events if "error" in event], events
    if case.path == "/generate":
        scores = [event["token"]["logprob"] for event in events]
        last = events[-1]
        return [(last["generated_text"], last["details"]["finish_reason"], scores)]
    said: dict[int, tuple[str, str | None, list[float]]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
        before = said.get(choice["index"], ("", None, []))
        scores = before[2] + _scores(choice["logprobs"])
        said[choice["index"]] = (before[0] + (piece or ""), choice["finish_reason"] or before[1], scores)
    return [said[index] for index in sorted(said)]


def _scores(logprobs: Any) -> list[float]:
    if logprobs is None:
        return []
    if "content" in logprobs:
        return [token["logprob"] for token in logprobs["content"]]
    return list(logprobs["token_logprobs"])


async def _ask(client: httpx.AsyncClient, case: Case, room: asyncio.Semaphore) -> tuple[Answer, Answer]:
    """One request, whole and streamed. `/generate` is streamed at a path of its own."""
    path = "/generate_stream" if case.path == "/generate" else case.path
    body = case.body if case.path == "/generate" else {**case.body, "stream": True}
    async with room:
        once, stream = await asyncio.gather(
            client.post(case.path, json=case.body), client.post(path, json=body)
        )
    assert once.status_code == stream.status_code == 200, (case, once.text, stream.text)
    return whole(case, once.json()), streamed(case, stream.text)


def test_streams_say_what_answers_say(server_url: str):
    async def all_of_them() -> list[tuple[Answer, Answer]]:
        room = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=server_url, timeout=120) as client:
            return await asyncio.gather(*(_ask(client, case, room) for case in drawn(REQUESTS)))

    answers = asyncio.run(all_of_them())
    for case, (once, stream) in zip(drawn(REQUESTS), answers, strict=True):
        assert [one[:2] for one in once] == [one[:2] for one in stream], case
        for (_, _, ours), (_, _, theirs) in zip(once, stream, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4), case
    # The draw must meet what it is about.
    reasons = {reason for once, _ in answers for _, reason, _ in once}
    assert {"length", "stop", "stop_sequence"} <= reasons
    assert sum(len(once) > 1 for once, _ in answers) > 20
    assert sum(any(scores for _, _, scores in once) for once, _ in answers) > 50
