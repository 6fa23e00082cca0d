"""The clients people use, unchanged, against whatever `server_url` is: nothing here depends on what the model says."""

import asyncio
import json
import shutil
import subprocess
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.clients

MESSAGES: Any = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Say hello."},
]
PROMPT = "The alphabet begins with a"


@pytest.fixture(scope="session")
def model(server_url: str) -> str:
    """The served model's name, found as clients find it."""
    return httpx.get(f"{server_url}/v1/models").json()["data"][0]["id"]


class TestOpenAI:
    @pytest.fixture
    def client(self, server_url: str) -> Any:
        from openai import OpenAI

        with OpenAI(base_url=f"{server_url}/v1/", api_key="none", max_retries=0, timeout=60) as client:
            yield client

    def test_models(self, client: Any, model: str):
        assert [m.id for m in client.models.list()] == [model]
        assert client.models.retrieve(model).id == model

    def test_chat(self, client: Any, model: str):
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_completion_tokens=8, temperature=0
        )
        choice = answer.choices[0]
        assert choice.message.content
        assert choice.message.role == "assistant"
        assert choice.finish_reason in ("stop", "length")
        assert answer.usage.completion_tokens <= 8
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens >= 0

    def test_a_stream_says_what_the_answer_says(self, client: Any, model: str):
        fields = {"model": model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**fields)
        pieces = list(
            client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        )
        text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        assert text == whole.choices[0].message.content
        assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.choices[0].finish_reason
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens

    def test_logprobs_and_choices(self, client: Any, model: str):
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=4, n=2, seed=1, logprobs=True, top_logprobs=3
        )
        assert [c.index for c in answer.choices] == [0, 1]
        for entry in answer.choices[0].logprobs.content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 3

    def test_a_seed_repeats_an_answer(self, client: Any, model: str):
        texts = {
            client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, seed=7)
            .choices[0]
            .message.content
            for _ in range(2)
        }
        assert len(texts) == 1

    def test_completions(self, client: Any, model: str):
        answer = client.completions.create(
            model=model, prompt=[PROMPT, "b"], max_tokens=4, temperature=0, logprobs=2
        )
        assert [c.index for c in answer.choices] == [0, 1]
        assert len(answer.choices[0].logprobs.tokens) <= 4
        stream = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=4, temperature=0, stream=True
        )
        assert "".join(p.choices[0].text for p in stream) == answer.choices[0].text

    def test_the_streaming_helper(self, client: Any, model: str):
        with client.chat.completions.stream(model=model, messages=MESSAGES, max_tokens=4) as stream:
            kinds = [event.type for event in stream]
        assert "chunk" in kinds

    def test_errors_are_the_clients_own(self, client: Any, model: str):
        import openai

        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="no-such-model", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        assert missing.value.request_id
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=model, messages=MESSAGES, temperature=5, stream=True)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model=model, prompt=PROMPT, max_tokens=10**7)
        assert long.value.code == "context_length_exceeded"

    def test_async(self, server_url: str, model: str):
        from openai import AsyncOpenAI

        async def ask() -> list[str]:
            async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
                fields: Any = {"model": model, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
                whole = [client.chat.completions.create(**fields) for _ in range(4)]
                texts = [answer.choices[0].message.content or "" for answer in await asyncio.gather(*whole)]
                pieces = await client.chat.completions.create(**fields, stream=True)
                texts.append("".join([p.choices[0].delta.content or "" async for p in pieces]))
                return texts

        texts = asyncio.run(ask())
        assert len(texts) == 5
        assert len(set(texts)) == 1


class TestOpenAIResponses:
    @pytest.fixture
    def client(self, server_url: str) -> Any:
        from openai import OpenAI

        with OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client

    @pytest.fixture
    def fields(self, model: str) -> dict[str, Any]:
        return {"model": model, "input": "Say hello.", "instructions": "Be brief.", "max_output_tokens": 8}

    def test_create(self, client: Any, fields: dict[str, Any]):
        answer = client.responses.create(**fields, temperature=0, store=True, metadata={"a": "b"})
        assert answer.output_text
        assert answer.status in ("completed", "incomplete")
        assert answer.usage.output_tokens <= 8
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
        assert answer.usage.input_tokens_details.cached_tokens >= 0
        items = [
            {"role": "user", "content": "Say hello."},
            *answer.output,
            {"role": "user", "content": "Again."},
        ]
        assert client.responses.create(**{**fields, "input": items}).output_text

    def test_a_stream_says_what_the_answer_says(self, client: Any, fields: dict[str, Any]):
        whole = client.responses.create(**fields, temperature=0)
        events = list(client.responses.create(**fields, temperature=0, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
        assert events[-1].type == f"response.{whole.status}"
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == whole.output_text == events[-1].response.output_text

    def test_the_streaming_helper(self, client: Any, fields: dict[str, Any]):
        with client.responses.stream(**fields) as stream:
            kinds = [event.type for event in stream]
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 1

    def test_errors_are_the_clients_own(self, client: Any, fields: dict[str, Any]):
        import openai

        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**fields, previous_response_id="resp_1", stream=True)
        assert refused.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            client.responses.create(**{**fields, "model": "no-such-model"})

    def test_async(self, server_url: str, fields: dict[str, Any]):
        from openai import AsyncOpenAI

        async def ask() -> set[str]:
            async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
                whole = [client.responses.create(**fields, temperature=0) for _ in range(3)]
                return {answer.output_text for answer in await asyncio.gather(*whole)}

        assert len(asyncio.run(ask())) == 1


class TestAnthropic:
    @pytest.fixture
    def client(self, server_url: str) -> Any:
        from anthropic import Anthropic

        with Anthropic(base_url=server_url, api_key="none", max_retries=0, timeout=60) as client:
            yield client

    @pytest.fixture
    def fields(self, model: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
        greedy = {"temperature": 0}  # newer clients have no argument for it
        return {
            "model": model,
            "system": "Be brief.",
            "messages": messages,
            "max_tokens": 8,
            "extra_body": greedy,
        }

    def test_create(self, client: Any, fields: dict[str, Any]):
        answer = client.messages.create(**fields)
        assert answer.content[-1].text
        assert answer.stop_reason in ("end_turn", "max_tokens")
        assert 0 < answer.usage.output_tokens <= 8
        asked = {name: fields[name] for name in ("model", "system", "messages")}
        count = client.messages.count_tokens(**asked).input_tokens
        assert count == answer.usage.input_tokens + answer.usage.cache_read_input_tokens

    def test_a_stream_says_what_the_answer_says(self, client: Any, fields: dict[str, Any]):
        whole = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == whole.content[-1].text == final.content[-1].text
        assert (final.stop_reason, final.usage.output_tokens) == (
            whole.stop_reason,
            whole.usage.output_tokens,
        )
        kinds = [event.type for event in client.messages.create(**fields, stream=True)]
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])

    def test_a_stop_sequence_is_told(self, client: Any, fields: dict[str, Any]):
        text = client.messages.create(**fields).content[-1].text
        stop = text[len(text) // 2 :]
        answer = client.messages.create(**fields, stop_sequences=[stop])
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)

    def test_errors_are_the_clients_own(self, client: Any, fields: dict[str, Any]):
        import anthropic

        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(**{**fields, "model": "no-such-model"})
        assert missing.value.request_id
        with pytest.raises(anthropic.BadRequestError, match="tools"):
            client.messages.create(**fields, tools=[{"name": "f", "input_schema": {"type": "object"}}])

    def test_async(self, server_url: str, fields: dict[str, Any]):
        from anthropic import AsyncAnthropic

        async def ask() -> set[str]:
            async with AsyncAnthropic(base_url=server_url, api_key="none", max_retries=0) as client:
                whole = [client.messages.create(**fields) for _ in range(3)]
                texts = {answer.content[-1].text for answer in await asyncio.gather(*whole)}
                async with client.messages.stream(**fields) as stream:
                    return texts | {await stream.get_final_text()}

        assert len(asyncio.run(ask())) == 1


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


def test_both_apis_give_the_same_greedy_text(server_url: str):
    """Two roads to one engine: a prompt's greedy continuation does not depend on the API."""
    native = httpx.post(
        f"{server_url}/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 6}}, timeout=60
    )
    openai = httpx.post(
        f"{server_url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 6, "temperature": 0}, timeout=60
    )
    assert native.json()["generated_text"] == openai.json()["choices"][0]["text"]


def test_tokenize_gives_back_the_text(server_url: str):
    text = "naïve café 🙂"
    tokens = httpx.post(f"{server_url}/tokenize", json={"inputs": text}).json()
    covered = {i for token in tokens for i in range(token["start"], token["stop"])}
    assert covered == set(range(len(text.encode())))


def test_metrics_count_what_was_asked(server_url: str):
    def count() -> float:
        lines = httpx.get(f"{server_url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith("tgi_request_success "))

    before = count()
    httpx.post(
        f"{server_url}/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 1}}, timeout=60
    )
    assert count() == before + 1
