"""Response templates of every shape that models have, and answers to read with them. What transformers makes of each answer
lies in response_answers.json, written by

    python -m tests.support.response_templates

where transformers is 5.13 or newer.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

ANSWERS = Path(__file__).with_name("response_answers.json")
FUNCTION = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "hot": {"type": "boolean"}},
}
TOOLS = {"weather": WEATHER, "now": {"type": "object", "properties": {}}}

CHANNELS = {
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {"open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
        "content": {"open": "<|channel|>final<|message|>", "close": ["<|end|>", "<|return|>"]},
        "tool_calls": {
            "open_pattern": r"<\|channel\|>commentary to=functions\.(?P<name>\w+).*?<\|message\|>",
            "close": "<|call|>",
            "repeats": True,
            "content": "json",
            "transform": NAMED,
        },
    },
}
"""As gpt-oss writes: every field opens with its own name."""
ACTIONS = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "fields": {
        "thinking": {"open": "<|START_THINKING|>", "close": "<|END_THINKING|>"},
        "content": {"open": "<|START_RESPONSE|>", "close": "<|END_RESPONSE|>"},
        "tool_calls": {
            "open": "<|START_ACTION|>",
            "close": "<|END_ACTION|>",
            "content": "json",
            "transform_each": True,
            "transform": {"function": {"name": "{tool_name}", "arguments": "{parameters}"}},
        },
    },
}
"""As Command R and A write: one list of calls."""
BARE_KEYS = {
    "version": 1,
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": NAMED,
        },
        "content": {"close": ["<turn|>", "<eos>"]},
    },
}
"""As Gemma 4 writes: JSON with bare keys and marks of its own round texts."""
MARKED = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": FUNCTION,
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)"},
    },
}
"""As most write: marks round JSON, everything else is text."""
TAGGED = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<call>\s*<f=(?P<name>[^>\n]+)>",
            "close_pattern": r"</f>\s*</call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<p=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</p>"},
            "transform": NAMED,
        },
        "content": {"close": "<|im_end|>"},
    },
}
"""As Qwen writes since 3.5: arguments in tags, without types."""
CALL_LIST = {
    "start_anchor_pattern": r"<\|im_start\|>assistant\s",
    "fields": {
        "tool_calls": {
            "open": "<|calls>",
            "close": "<calls|>",
            "content": "python-call-list",
            "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        },
        "content": {},
    },
}
"""As LFM2 writes: Python."""
BLOCKS = {
    "start_anchor": "<|model|>",
    "fields": {
        "thinking": {
            "open_pattern": r"(?:<\|model\|>)?[^<]*<\|thinking\|>",
            "close": "<|end|>",
            "repeats": True,
            "join": " ",
            "content_args": {"strip": False},
        },
        "content": {
            "open_pattern": r"(?:<\|model\|>)?[^<]*<\|text\|>",
            "close": "<|end|>",
            "repeats": True,
            "join": "",
            "content_args": {"strip": False},
        },
        "tool_calls": {
            "open_pattern": r"(?:<\|model\|>)?[^<]*<\|invoke\|>",
            "close": "<|end|>",
            "repeats": True,
            "content": "json",
            "transform": {"function": {"name": "{content.tool}", "arguments": "{content.args}"}},
        },
    },
}
"""As Inkling writes: blocks with a head that may be missing, joined."""
LINES = {
    "start_anchor": "A:",
    "fields": {
        "thinking": {"open_pattern": r"(?:^|<think>\s*)", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"CALL (?P<name>\w+)\n",
            "close_pattern": r"\n?END",
            "repeats": True,
            "content": "kv-lines",
            "content_args": {
                "kv_sep": "=",
                "value_parser": {"name": "json", "args": {"allow_non_json": True}},
            },
            "transform": NAMED,
        },
        "content": {"open": "<answer>\n", "close_pattern": r"\n?</answer>"},
    },
}
"""Of no model: thinking that begins with the answer, arguments a line each."""


class Case(NamedTuple):
    """An answer behind a prompt."""

    template: str
    answer: str
    prompt: str = ""
    begun: str = ""
    """What the prompt says of a text that the answer goes on with."""


TEMPLATES: dict[str, dict[str, Any]] = {
    "channels": CHANNELS, "actions": ACTIONS, "bare keys": BARE_KEYS, "marked": MARKED, "tagged": TAGGED,
    "call list": CALL_LIST, "blocks": BLOCKS, "lines": LINES,
}  # fmt: skip
_CHANNEL = "<|channel|>analysis<|message|>We look it up.<|end|><|start|>assistant"
_CALLED = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo", "days": 2}'
_PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
CASES = [
    Case("channels", f"{_CHANNEL}<|channel|>final<|message|>It is warm.<|return|>", "<|start|>assistant"),
    Case("channels", f"{_CHANNEL}<|channel|>final<|message|>It is < 5 °C <|en"),
    Case("channels", f"{_CHANNEL}{_CALLED}<|call|>"),
    Case("channels", f"{_CHANNEL}{_CALLED}"),
    Case("channels", "thought so far<|end|>", "<|start|>assistant<|channel|>analysis<|message|>A ", "A "),
    Case("actions", "<|START_THINKING|>Hm.\n<|END_THINKING|><|START_RESPONSE|>Hello \n<|END_RESPONSE|>"),
    Case(
        "actions",
        '<|START_THINKING|>Both.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", '
        '"parameters": {"city": "Oslo", "days": "3"}},\n    {"tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
    ),
    Case("bare keys", "<|channel>thought\nI see.\n<channel|>Hello!<turn|>", "<|turn>model\n"),
    Case(
        "bare keys",
        '<|tool_call>call:weather{city:<|"|>Os"lo\n<|"|>,days:2,hot:true}<tool_call|>'
        '<|tool_call>call:now{}<tool_call|>',
        "<|turn>user\nx<turn|>\n<|turn>model\n",
    ),
    Case("bare keys", '<|tool_call>call:weather{"city": "a {b: c}"}<tool_call|>', "<|tool_response>x<tool_response|>"),
    Case("marked", "<think>\nI wonder.\n</think>\n\nHello there.<|im_end|>", _PROMPT),
    Case("marked", "I wonder.</think>Hello there.", f"{_PROMPT}<think>\n"),
    Case("marked", 'Let me look.\n\n<call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</call>\n<|im_end|>\n<|endoftext|>', _PROMPT),
    Case("marked", '<call>{"name": "now", "arguments": {}}</call>\n<call>{"name": "weather", "arguments": {"days": "4", "hot": "true"}}</call>', _PROMPT),
    Case("marked", "a < b <thin <cal </think> c", _PROMPT),
    Case("marked", "", _PROMPT),
    Case("marked", "goes on.", f"{_PROMPT}It ", "It "),
    Case(
        "tagged",
        "<think>Hm</think>\n\n<call>\n<f=weather>\n<p=city>\nNew\nYork\n</p>\n<p=days>\n3\n</p>\n<p=hot>\nFalse\n</p>\n</f>\n</call>"
        "\n<call>\n<f=now>\n</f>\n</call><|im_end|>",
        _PROMPT,
    ),
    Case("call list", '<|calls>[weather(city="Oslo", days=-2, hot=None), now()]<calls|>', _PROMPT),
    Case("call list", "No <|call is needed.", _PROMPT),
    Case("call list", "<|calls>[weather(city='it\\'s \\u00e5 \"b\"', days=[1, {\"a\": true}])]<calls|>Done.", _PROMPT),
    Case("blocks", "<|thinking|> a <|end|><|model|>me<|thinking|>b<|end|><|model|><|text|> Hi <|end|>", "<|model|>"),
    Case("blocks", '<|model|>tool<|invoke|>{"tool": "weather", "args": {"city": "x"}}<|end|>', "<|model|>"),
    Case("lines", "The user asks.\n</think>\n<answer>\nYes.\n</answer>"),
    Case("lines", "Hm</think>CALL weather\ncity = Oslo\ndays=3\nEND", "A:"),
    Case("lines", "Hm</think>CALL weather\ncity = \n\nhot=true\n", "A:"),
]  # fmt: skip


def normal(message: dict[str, Any]) -> dict[str, Any]:
    """What transformers found, under one set of names."""
    calls = [
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())
    ]
    thought = message.get("reasoning_content") or message.get("thinking") or ""
    return {"reasoning": thought, "content": message.get("content", ""), "calls": calls}


def record() -> None:
    """Ask transformers."""
    from transformers import __version__
    from transformers.utils.chat_parsing import parse_response  # type: ignore[import-not-found]

    tools = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in TOOLS.items()]
    answers = [
        normal(parse_response(case.answer, TEMPLATES[case.template], prefix=case.prompt, tools=tools))
        for case in CASES
    ]
    ANSWERS.write_text(
        json.dumps({"transformers": __version__, "answers": answers}, indent=1, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    record()
