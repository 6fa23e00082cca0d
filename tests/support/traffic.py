"""Streams of every kind that a server offers, and what was heard in one, so that two can be compared.

Knows the APIs; not what is done to the server meanwhile.
"""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

COUNT = {"stream": True, "stream_options": {"include_usage": True}}
SEEDED = {"temperature": 0.8, "seed": 11}
USER = [{"role": "user", "content": "Tell me of a city: its name, its people, its river."}]
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "people": {"type": "integer"}, "river": {"type": "string", "maxLength": 40}},
    "required": ["name", "people", "river"],
    "additionalProperties": False,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "visit", "description": "Go there.", "parameters": CITY}}


@dataclass(frozen=True)
class Kind:
    """One kind of stream."""

    path: str
    body: Mapping[str, Any]


def _completion(**fields: Any) -> Kind:
    whole = {"prompt": "1, 2, 3, 4, 1, 2, 3, 4, 1,", "max_tokens": 48, "ignore_eos": True, **COUNT, **fields}
    return Kind("/v1/completions", whole)


def _chat(**fields: Any) -> Kind:
    return Kind("/v1/chat/completions", {"messages": USER, "max_tokens": 48, **COUNT, **fields})


KINDS: Mapping[str, Kind] = {
    "greedy": _completion(temperature=0),
    "seeded": _completion(**SEEDED, prompt="Once upon a time", n=2),
    "log-probabilities": _chat(temperature=0, logprobs=True, top_logprobs=3),
    "penalties": _chat(**SEEDED, frequency_penalty=0.7, repetition_penalty=1.2, stop=["\n\n\n"]),
    "guided": _chat(
        **SEEDED, response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    ),
    "tools": _chat(temperature=0, tools=[TOOL], tool_choice="required"),
    "TGI": Kind(
        "/generate_stream",
        {
            "inputs": "The river flows",
            "parameters": {"max_new_tokens": 48, "seed": 5, "do_sample": True, "details": True},
        },
    ),
}
"""Each says the same whenever it is asked."""


@dataclass
class Heard:
    """What one stream said."""

    texts: dict[int, str] = field(default_factory=dict)
    """Of each choice, calls of tools included."""
    ends: dict[int, str] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    """Log-probabilities of the tokens, as far as they were told."""
    tokens: int = 0
    """As the server counts them."""

    def take(self, event: Mapping[str, Any]) -> None:
        """One event. Raises AssertionError if it tells of an error."""
        assert "error" not in event, event
        if token := event.get("token"):
            self._say(
                0, token["text"], None if event["details"] is None else event["details"]["finish_reason"]
            )
            self.scores.append(token["logprob"])
            self.tokens += 1
        for choice in event.get("choices", ()):
            self._say(choice["index"], _text(choice), choice["finish_reason"])
            if choice.get("logprobs"):
                self.scores += [each["logprob"] for each in choice["logprobs"]["content"]]
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]

    def _say(self, index: int, text: str, end: str | None) -> None:
        self.texts[index] = self.texts.get(index, "") + text
        if end is not None:
            assert index not in self.ends, "it ended twice"
            self.ends[index] = end

    def like(self, other: "Heard") -> bool:
        """The same text, ends and tokens; log-probabilities to what rounding leaves of them."""
        near = len(self.scores) == len(other.scores) and all(
            abs(mine - theirs) < 1e-3 for mine, theirs in zip(self.scores, other.scores, strict=True)
        )
        return near and (self.texts, self.ends, self.tokens) == (other.texts, other.ends, other.tokens)


def _text(choice: Mapping[str, Any]) -> str:
    if "text" in choice:
        return choice["text"]
    delta = choice["delta"]
    calls = [call["function"] for call in delta.get("tool_calls") or ()]
    return (delta.get("content") or "") + "".join(
        call.get("name", "") + call.get("arguments", "") for call in calls
    )


async def events(client: httpx.AsyncClient, kind: Kind) -> AsyncIterator[dict[str, Any]]:
    """The events of one stream. Raises AssertionError unless it is served."""
    async with client.stream("POST", kind.path, json=kind.body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data:") and line[5:].strip() != "[DONE]":
                yield json.loads(line[5:])


async def heard(client: httpx.AsyncClient, kind: Kind, notice: Callable[[], object] = lambda: None) -> Heard:
    """All that one stream says; `notice` is called at each event."""
    whole = Heard()
    async for event in events(client, kind):
        whole.take(event)
        notice()
    assert whole.ends, f"it did not end: {whole}"
    return whole
