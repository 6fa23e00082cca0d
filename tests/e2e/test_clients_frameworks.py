"""Frameworks on top of OpenAI's API, unchanged, against whatever `server_url` is: LangChain and LiteLLM."""

import asyncio
from typing import Any

import pytest

pytestmark = [
    pytest.mark.clients,
    # Their own, about pydantic and about sockets they leave to the collector.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MESSAGES = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Say hello."},
]


class TestLangChain:
    @pytest.fixture
    def chat(self, server_url: str, model: str) -> Any:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            model=model, base_url=f"{server_url}/v1", api_key="none", temperature=0, max_tokens=8,
            max_retries=0, timeout=60, stream_usage=True,
        )  # fmt: skip

    def test_invoke(self, chat: Any, model: str):
        answer = chat.invoke([("system", "Answer in one word."), ("human", "Say hello.")])
        assert answer.content
        assert answer.response_metadata["model_name"] == model
        assert answer.response_metadata["finish_reason"] in ("stop", "length")
        assert 1 <= answer.usage_metadata["output_tokens"] <= 8

    def test_a_stream_says_what_the_answer_says(self, chat: Any):
        whole = chat.invoke("Say hello.")
        pieces = list(chat.stream("Say hello."))
        assert "".join(piece.content for piece in pieces) == whole.content
        usage = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
        assert [one["output_tokens"] for one in usage] == [whole.usage_metadata["output_tokens"]]

    def test_logprobs_and_stop(self, chat: Any):
        told = chat.bind(logprobs=True, top_logprobs=2).invoke("Say hello.")
        content = told.response_metadata["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in content)
        assert "".join(token["token"] for token in content) == told.content
        end = told.content[1:3]
        cut = chat.bind(stop=[end]).invoke("Say hello.")
        assert cut.content == told.content[: told.content.index(end)]

    def test_many_at_once(self, chat: Any):
        alone = [chat.invoke(f"Say {word}.").content for word in ("one", "two", "three")]
        assert [a.content for a in chat.batch([f"Say {word}." for word in ("one", "two", "three")])] == alone

    def test_async(self, chat: Any):
        async def ask() -> tuple[str, str]:
            whole = await chat.ainvoke("Say hello.")
            pieces = [piece.content async for piece in chat.astream("Say hello.")]
            return whole.content, "".join(pieces)

        whole, streamed = asyncio.run(ask())
        assert whole == streamed

    def test_completions(self, server_url: str, model: str):
        from langchain_openai import OpenAI

        llm = OpenAI(
            model=model,
            base_url=f"{server_url}/v1",
            api_key="none",
            temperature=0,
            max_tokens=6,
            max_retries=0,
        )
        assert llm.invoke("The alphabet begins with a") == "".join(llm.stream("The alphabet begins with a"))


class TestLiteLLM:
    @pytest.fixture
    def ask(self, server_url: str, model: str) -> Any:
        import litellm

        litellm.telemetry = False
        fields = {
            "model": f"openai/{model}",
            "api_base": f"{server_url}/v1",
            "api_key": "none",
            "timeout": 60,
        }

        def ask(**more: Any) -> Any:
            return litellm.completion(
                **{
                    **fields,
                    "messages": MESSAGES,
                    "max_tokens": 8,
                    "temperature": 0,
                    "num_retries": 0,
                    **more,
                }
            )

        return ask

    def test_chat(self, ask: Any):
        answer = ask()
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert 1 <= answer.usage.completion_tokens <= 8

    def test_a_stream_says_what_the_answer_says(self, ask: Any):
        whole = ask()
        pieces = list(ask(stream=True, stream_options={"include_usage": True}))
        said = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        assert said == whole.choices[0].message.content
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens

    def test_choices_and_seeds(self, ask: Any):
        fields = {"n": 2, "temperature": 0.9, "seed": 7}
        first, second = ask(**fields), ask(**fields)
        assert len(first.choices) == 2
        assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]

    def test_an_error_is_of_its_own_class(self, ask: Any):
        import litellm

        with pytest.raises(litellm.BadRequestError, match="temperature"):
            ask(temperature=-1)
        with pytest.raises(litellm.NotFoundError, match="does not exist"):
            ask(model="openai/another-model")
