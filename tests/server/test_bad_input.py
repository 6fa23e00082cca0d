"""Every kind of bad body, thrown at a real server while other streams go on: they stay as they are, to the byte.

The numbers are those of a checklist: what is bad, and what has to come of it. What is bad about the HTTP itself is in
test_bad_http.py; what each parameter's limits are, beside the tests of each API.
"""

import json
import resource
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as Words
from tokenizers.models import BPE

from xlane.models.chat import ChatTemplates
from xlane.models.template_processes import USUAL, TemplateLimits
from xlane.models.typed import TypedText
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig

from ..support.byte_tokenizer import ByteTokenizer
from ..support.canaries import Canaries, canaries
from ..support.fake_engine import FakeEngine
from ..support.live_server import live_server

CHAT, COMPLETIONS, NATIVE, RESPONSES, MESSAGES = (
    "/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses", "/v1/messages",
)  # fmt: skip
SCHEMA = "response_format.json_schema.schema"
JSON = {"content-type": "application/json"}


HOSTILE = """
{% set n = namespace(list=messages) %}
{% if thinking == "for ever" %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{% elif thinking == "in one step" %}{{ 10 ** (messages | length * 10**9) }}
{% elif thinking == "repeated" %}{{ messages[0].content * 10**9 }}
{% elif thinking == "growing" %}{% for i in range(60) %}{% set n.list = n.list + n.list %}{% endfor %}
{% endif %}"""
TAKES = {
    "for ever": "longer than 1 s for these messages (--limit template_timeout_s=…)",
    "in one step": "longer than 1 s for these messages (--limit template_timeout_s=…)",
    "repeated": "more than 64 MB of memory for these messages (--limit template_memory_bytes=…)",
    "growing": "more than 64 MB of memory for these messages (--limit template_memory_bytes=…)",
}


class Tokenizer(ByteTokenizer):
    """Of a model whose template takes tools, and all there is of something, if it is told to."""

    tool_template = "{{ tools }}<tool_call>"

    def __init__(self) -> None:
        self._hostile = ChatTemplates({"default": HOSTILE}, {})
        self._typed = TypedText(Words(BPE()))

    def apply_chat(
        self, messages: Any, tools: Any = None, *args: Any, limits: TemplateLimits = USUAL, **kwargs: Any
    ) -> str:
        if "thinking" in kwargs:
            return self._hostile.render(messages, limits=limits, **kwargs)
        messages, tools = self._typed.broken(messages), self._typed.broken(tools)
        return super().apply_chat(messages, tools, *args, limits=limits, **kwargs)


@pytest.fixture(scope="module")
def birds() -> Iterator[Canaries]:
    engine, backend = FakeEngine(delay_s=0.002), Backend()
    backend.ready(engine, Tokenizer(), engine.info_value)
    config = ServerConfig(template_timeout_s=1, template_memory_bytes=64_000_000)
    with live_server(backend, config) as server, canaries(server) as birds:
        yield birds
    assert engine.active == 0


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client() as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, **fields}


def complete(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": 4, **fields}


def schema(value: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"a": value}, "required": ["a"]}
    return value


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, **fields}}


def called(arguments: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return chat(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}])


def user(content: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": content}])


MANY_KEYS = json.dumps({f"k{i}": 0 for i in range(150_000)}).encode()
PARTS: Any = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/\\@x"}}]

Row = tuple[int, str, Any, int, str | None]
"""Number in the checklist, path, body (bytes as they are, else JSON), status, and `param` where OpenAI's shape has it."""

ROWS: list[Row] = [
    (1, CHAT, b'{"messages": [', 400, None),
    (1, COMPLETIONS, b"", 400, None),
    (1, RESPONSES, b"[]", 400, None),
    (1, MESSAGES, b'"a"', 400, None),
    (1, NATIVE, b"{", 400, None),
    (2, CHAT, b'{"messages": "\xff"}', 400, "messages"),
    (2, CHAT, b"\xef\xbb\xbf{}", 400, None),
    (2, CHAT, b'{"temperature": NaN}', 400, None),
    (2, CHAT, b'{"temperature": Infinity}', 400, None),
    (2, COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None),
    (3, CHAT, b'{"a":' * 100_000, 400, None),
    (3, COMPLETIONS, b'{"prompt":' + b"[" * 100_000, 400, "prompt[0][0]"),
    (3, CHAT, MANY_KEYS, 400, "messages"),
    (3, COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "seed"),
    (3, COMPLETIONS, b'{"prompt": "a", "temperature": 1e9999}', 400, "temperature"),
    (4, CHAT, b" " * 2_000_001, 413, None),
    (12, CHAT, {"messages": []}, 400, "messages"),
    (12, CHAT, {}, 400, "messages"),
    (12, CHAT, chat(messages=[{"role": "user", "content": ""}] * 50_000), 400, "messages"),
    (12, CHAT, chat(messages=[{"role": "foo", "content": "a"}]), 400, "messages[0].role"),
    (12, CHAT, user(None), 400, "messages[0].content"),
    (12, CHAT, user(5), 400, "messages[0].content"),
    (12, CHAT, user([5]), 400, "messages[0].content[0]"),
    (13, CHAT, chat(unknown=1, nobody={"knows": [None]}), 200, None),
    (14, CHAT, chat(temperature="x" * 4000), 400, "temperature"),
    (14, CHAT, chat(model="x" * 4000), 404, "model"),
    (14, CHAT, chat(chat_template_kwargs={"x" * 4000: 1}), 400, "chat_template_kwargs"),
    *((15, CHAT, chat(**{name: value}), 400, name)
      for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")
      for value in (-3, 1e308, "1", True)),
    *((15, COMPLETIONS, complete(**{name: value}), 400, name)
      for name in ("top_k", "repetition_penalty") for value in (-3, 1e308, "1", True)),
    *((16, CHAT, chat(n=n, stream=stream), 400, "n") for n in (0, -1, 129, 10**9) for stream in (False, True)),
    *((17, CHAT, chat(max_tokens=n), 400, "max_tokens") for n in (0, -1, 2**63, 513)),
    (17, NATIVE, {"inputs": "a", "parameters": {"max_new_tokens": 513}}, 422, None),
    *((18, CHAT, chat(logprobs=True, top_logprobs=n), 400, "top_logprobs") for n in (21, 10**6, -1)),
    *((18, COMPLETIONS, complete(prompt_logprobs=n), 400, "prompt_logprobs") for n in (21, 10**6, -1)),
    (19, CHAT, chat(logit_bias={str(i): 1 for i in range(100_000)}), 400, "logit_bias"),
    *((19, CHAT, chat(logit_bias={token: bias}), 400, "logit_bias")
      for token, bias in (("259", 1), ("abc", 1), ("1", 1e38), ("1", -1e38))),
    (19, CHAT, chat(logit_bias={str(i): -100 for i in range(256)}), 200, None),
    *((20, CHAT, chat(stop=stop), 400, "stop") for stop in (["x"] * 1000, "", ["a", ""], "x" * 1_000_000)),
    *((21, COMPLETIONS, complete(prompt=prompt), 400, "prompt")
      for prompt in ("", [], [[]], [-1], [2**31], [259], ["a"] * 100_000, "x" * 1_900_000)),
    (21, COMPLETIONS, json.dumps(complete(prompt="x" * 10_000_000)).encode(), 413, None),
    (22, COMPLETIONS, complete(prompt="7" * 200_000), 400, "prompt"),
    (22, CHAT, user("👩‍👩‍👧‍👦" * 10_000), 400, "messages"),
    (24, CHAT, chat(chat_template="{% for a in range(9**9) %}{% endfor %}"), 400, "chat_template"),
    *((24, CHAT, chat(chat_template_kwargs={name: 1}), 400, "chat_template_kwargs")
      for name in ("tokenize", "chat_template", "messages", "__class__")),
    (24, CHAT, chat(chat_template_kwargs={"documents": [0] * 50_000}), 400, "messages"),
    (24, CHAT, chat(chat_template_kwargs={"thinking": "for ever"}), 400, "messages"),
    (26, CHAT, schema({"type": "nothing"}), 400, SCHEMA),
    (26, CHAT, schema({"$ref": "http://169.254.169.254/x.json"}), 400, SCHEMA),
    (26, CHAT, schema({"not": {"type": "string"}}), 400, SCHEMA),
    (26, CHAT, schema(deep(20)), 200, None),
    (26, CHAT, schema(deep(100)), 400, SCHEMA),
    (26, CHAT, schema({"enum": [f"value {i}" for i in range(50_000)]}), 400, SCHEMA),
    (26, CHAT, schema({"type": "string", "pattern": "(a+)+$"}), 200, None),
    *((27, CHAT, chat(guided_regex=pattern), 200, None) for pattern in ("(a+)+", "a{1,100000000}")),
    *((27, CHAT, chat(guided_regex=pattern), 400, "guided_regex") for pattern in ("(", "a(?=b)", "[", "a{2,1}")),
    (27, CHAT, chat(guided_grammar='start: "a" missing'), 400, "guided_grammar"),
    (28, CHAT, chat(tools=[tool(name=f"f{i}") for i in range(2000)]), 400, "tools"),
    (28, CHAT, chat(tools=[tool(), tool()]), 400, "tools"),
    (28, CHAT, chat(tools=[tool(name="a\nb")]), 400, "tools[0].function.name"),
    (28, CHAT, chat(tools=[tool(name="😀")]), 400, "tools[0].function.name"),
    (28, CHAT, chat(tools=[tool(parameters=5)]), 400, "tools[0].function.parameters"),
    (28, CHAT, chat(tools=[tool(parameters=deep(300))]), 400, "tools[0].function.parameters"),
    (28, RESPONSES, {"input": "a", "tools": [tool() | {"name": "f", "parameters": deep(127)}]}, 400, None),
    (28, CHAT, called('{"a":' * 900 + "1" + "}" * 900), 400, "messages"),
    (28, CHAT, chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}), 400, "tool_choice"),
    (29, CHAT, user(PARTS), 400, "messages[0].content"),
    (29, CHAT, user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400, "messages[0].content"),
    (29, NATIVE, {"inputs": "![](http://127.0.0.1:1/x)", "parameters": {"max_new_tokens": 1}}, 200, None),
    *((30, CHAT, chat(model=model), 404, "model") for model in ("none", "../../etc/passwd", "x" * 1_000_000)),
    (30, NATIVE, {"inputs": "a", "parameters": {"adapter_id": "../../etc"}}, 404, None),
    (31, CHAT, chat(priority=2**63), 400, "priority"),
    *((31, CHAT, chat(seed=seed), 400, "seed") for seed in (-(2**63) - 1, 2**64)),
    (31, CHAT, chat(user="x" * 1_000_000), 200, None),
    (31, CHAT, chat(cache_salt="x" * 1000), 400, "cache_salt"),
    (32, CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (32, CHAT, chat(stream="true"), 400, "stream"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])
def test_a_bad_body_is_refused_and_nobody_else_notices(birds: Canaries, client: httpx.Client, row: Row):
    _, path, body, status, param = row
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(birds.url + path, content=content, headers=JSON, timeout=20)
    assert answer.status_code == status, answer.text[:500]
    if status != 200:
        assert len(answer.content) < 4096
        assert "Traceback" not in answer.text
        assert " at 0x" not in answer.text
    if status in (400, 404) and path.startswith("/v1/c"):
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert birds.wrong == []


def test_the_other_streams_went_on(birds: Canaries):
    birds.check()
    assert min(birds.rounds) > 10


@pytest.mark.parametrize("thinking", TAKES)
def test_a_template_that_takes_too_much_is_broken_off_and_nobody_else_notices(birds: Canaries, thinking: str):
    before = most_memory_bytes()
    for _ in range(3):  # More than there are threads.
        answer = httpx.post(birds.url + CHAT, json=chat(chat_template_kwargs={"thinking": thinking}))
        assert answer.json()["error"]["message"] == f"the chat template takes {TAKES[thinking]}"
        assert answer.status_code == 400
    assert httpx.post(birds.url + CHAT, json=chat()).status_code == 200
    assert most_memory_bytes() - before < 30_000_000
    assert birds.wrong == []


def most_memory_bytes() -> int:
    """The most that this process, which is the server's, ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_requests_that_share_an_id_are_two(birds: Canaries):
    body, ids = complete(stream=True, temperature=0), {"x-request-id": "the-same"}
    with (
        httpx.Client(base_url=birds.url, headers=ids) as client,
        client.stream("POST", COMPLETIONS, json=body) as first,
    ):
        second = client.post(COMPLETIONS, json=complete(prompt="k", temperature=0))
        events = [json.loads(line[6:]) for line in first.iter_lines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == "bcde"
    assert second.json()["choices"][0]["text"] == "lmno"
