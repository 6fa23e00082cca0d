"""Hugging Face's clients, and curl, against whatever `server_url` is: nothing here depends on what the model says."""

import json
import shutil
import subprocess
from typing import Any

import pytest

from .test_clients import CHAT_TOOL, MESSAGES, PROMPT, WEATHER, check_weather

pytestmark = pytest.mark.clients


class TestHuggingFaceHub:
    @pytest.fixture(autouse=True)
    def online(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Tests run with the hub switched off, which this client takes to mean every address."""
        from huggingface_hub import constants, utils

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        reset = getattr(utils, "reset_sessions", lambda: None)
        reset()
        yield
        reset()

    @pytest.fixture
    def client(self, server_url: str) -> Any:
        from huggingface_hub import InferenceClient

        return InferenceClient(base_url=server_url)

    @pytest.fixture
    def at_root(self, server_url: str) -> Any:
        from huggingface_hub import InferenceClient

        return InferenceClient(model=server_url)

    def test_text_generation(self, at_root: Any):
        text = at_root.text_generation(PROMPT, max_new_tokens=4, return_full_text=False)
        full = at_root.text_generation(PROMPT, max_new_tokens=4, return_full_text=True)
        assert full == PROMPT + text

    def test_text_generation_details(self, at_root: Any):
        answer = at_root.text_generation(
            PROMPT, max_new_tokens=4, details=True, do_sample=True, seed=3, top_n_tokens=2, stop=["zzzz"]
        )
        assert answer.details.seed == 3
        assert answer.details.generated_tokens == len(answer.details.tokens) <= 4
        assert len(answer.details.top_tokens[0]) == 2
        assert answer.details.finish_reason in ("length", "eos_token")

    def test_text_generation_stream(self, at_root: Any):
        fields = {"max_new_tokens": 4, "return_full_text": False}
        pieces = list(at_root.text_generation(PROMPT, stream=True, details=True, **fields))
        assert [piece.index for piece in pieces] == list(range(1, len(pieces) + 1))
        assert pieces[-1].generated_text == at_root.text_generation(PROMPT, **fields)
        assert pieces[-1].details.generated_tokens == len(pieces)
        assert pieces[-1].details.input_length > 0
        texts = list(at_root.text_generation(PROMPT, stream=True, **fields))
        assert texts == [piece.token.text for piece in pieces]

    def test_text_generation_errors(self, at_root: Any):
        from huggingface_hub.errors import ValidationError

        with pytest.raises(ValidationError, match="`temperature` must be strictly positive"):
            at_root.text_generation(PROMPT, temperature=0.0)

    def test_chat(self, client: Any):
        answer = client.chat_completion(MESSAGES, max_tokens=4, temperature=0)
        assert answer.choices[0].message.content
        pieces = list(client.chat_completion(MESSAGES, max_tokens=4, temperature=0, stream=True))
        text = "".join(p.choices[0].delta.content or "" for p in pieces)
        assert text == answer.choices[0].message.content
        assert pieces[-1].choices[0].finish_reason == answer.choices[0].finish_reason

    def test_grammars_and_tools(self, client: Any, at_root: Any):
        fields = {"max_new_tokens": 200, "return_full_text": False}
        text = at_root.text_generation(PROMPT, **fields, grammar={"type": "json", "value": WEATHER})
        assert check_weather(json.loads(text))
        answer = client.chat_completion(MESSAGES, max_tokens=200, tools=[CHAT_TOOL], tool_choice="required")
        [call, *_] = answer.choices[0].message.tool_calls
        assert call.function.name == "weather"
        assert check_weather(json.loads(call.function.arguments))
        form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
        answer = client.chat_completion(MESSAGES, max_tokens=200, response_format=form)
        assert check_weather(json.loads(answer.choices[0].message.content))


class TestTextGeneration:
    """TGI's own client. It posts to the root, wants `details`, and parses a chat strictly."""

    @pytest.fixture
    def client(self, server_url: str) -> Any:
        from text_generation import Client

        return Client(server_url, timeout=60)

    def test_generate(self, client: Any):
        answer = client.generate(PROMPT, max_new_tokens=4)
        assert answer.details.generated_tokens == len(answer.details.tokens)
        full = client.generate(PROMPT, max_new_tokens=4, return_full_text=True)
        assert full.generated_text == PROMPT + answer.generated_text

    def test_sampling(self, client: Any):
        fields = {
            "do_sample": True, "seed": 1, "temperature": 0.8, "top_k": 10, "top_p": 0.9, "typical_p": 0.95,
            "repetition_penalty": 1.1, "frequency_penalty": 0.1, "truncate": 8, "stop_sequences": ["zzzz"],
            "top_n_tokens": 3, "max_new_tokens": 4,
        }  # fmt: skip
        first, second = (client.generate(PROMPT, **fields) for _ in range(2))
        assert first.generated_text == second.generated_text
        assert first.details.seed == 1
        best = client.generate(PROMPT, do_sample=True, best_of=2, max_new_tokens=4)
        assert len(best.details.best_of_sequences) == 1

    def test_generate_stream(self, client: Any):
        pieces = list(client.generate_stream(PROMPT, max_new_tokens=4, top_n_tokens=2))
        assert pieces[-1].generated_text == client.generate(PROMPT, max_new_tokens=4).generated_text
        assert pieces[-1].details.generated_tokens == len(pieces)
        assert len(pieces[0].top_tokens) == 2

    def test_errors(self, client: Any):
        from text_generation.errors import ValidationError

        for ask in (client.generate, lambda *args, **kw: list(client.generate_stream(*args, **kw))):
            with pytest.raises(ValidationError, match="`max_new_tokens` must be strictly positive"):
                ask(PROMPT, max_new_tokens=0)

    def test_chat(self, client: Any):
        answer = client.chat(MESSAGES, max_tokens=4, temperature=0.0)
        assert answer.choices[0].message.content
        assert answer.usage["completion_tokens"] <= 4

    def test_chat_stream(self, client: Any):
        pieces: list[Any] = []
        # It parses every chunk but has no notion of `[DONE]`, whoever sends it.
        with pytest.raises(json.JSONDecodeError):
            pieces.extend(client.chat(MESSAGES, max_tokens=4, temperature=0.0, stream=True))
        answer = client.chat(MESSAGES, max_tokens=4, temperature=0.0)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == answer.choices[0].message.content
        assert pieces[-1].choices[0].finish_reason == answer.choices[0].finish_reason


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
class TestCurl:
    def curl(self, *arguments: str) -> str:
        command = ["curl", "--silent", "--show-error", "--max-time", "60", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def post(self, url: str, body: dict[str, Any], *arguments: str) -> str:
        header = "Content-Type: application/json"
        return self.curl(url, "-H", header, "-d", json.dumps(body), *arguments)

    def test_generate(self, server_url: str):
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
        text = json.loads(self.post(f"{server_url}/generate", body))["generated_text"]
        stream = self.post(f"{server_url}/generate_stream", body, "--no-buffer")
        *_, last, end = stream.split("\n\n")
        assert end == ""
        assert json.loads(last.removeprefix("data: "))["generated_text"] == text

    def test_without_the_json_header(self, server_url: str):
        status = self.curl(
            f"{server_url}/generate", "-d", '{"inputs":"a"}', "-o", "/dev/null", "-w", "%{http_code}"
        )
        assert status == "415"

    def test_health_and_head(self, server_url: str):
        for path in ("/health", "/ping", "/v1/health", "/"):
            assert "200" in self.curl("--head", server_url + path).splitlines()[0]
