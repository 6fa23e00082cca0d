"""Log-probabilities through HTTP against transformers' in float32: TGI's are of what is sampled from, OpenAI's are the model's
own, whatever the temperature. All requests share the batch."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from xlane.engine import SamplingParams
from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.tokenizer import TextTokenizer

from ..support.reference import penalized, top_k
from ..support.whole_server import Served
from .make_demo_greedy import reference_model

TOLERANCE = 1e-4
"""Of a log-probability, absolute, float32. Never relaxed."""
TOKENS, TOP = 5, 4
PROMPTS = ("The three laws of motion are", "1, 1, 2, 3, 5, 8,", "Das ist ein Satz über Käse 🧀, und")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.7, "seed": 3},
    "hot": {"temperature": 1.8, "seed": 4},
    "penalties": {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "top-k": {"temperature": 0.8, "seed": 6, "top_k": 20},
}

Answers = dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.from_path(demo_model(default_cache_dir()))


class Reference:
    """transformers' logits of a prompt and what was generated after it."""

    def __init__(self, path: Path) -> None:
        self._model = reference_model(path)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float64[T, V]: of the token after each."""
        import torch

        with torch.no_grad():
            return self._model(input_ids=torch.tensor([list(ids)])).logits[0].double().numpy()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(demo_model(default_cache_dir()))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def transformed(logits: np.ndarray, way: dict[str, Any], prompt: list[int], output: list[int]) -> np.ndarray:
    """What is sampled from, as the contract orders it: penalties, temperature, top-k."""
    params = SamplingParams(
        max_tokens=TOKENS,
        repetition_penalty=way.get("repetition_penalty", 1.0),
        frequency_penalty=way.get("frequency_penalty", 0.0),
    )
    changed = np.array(penalized(logits.tolist(), params, prompt, output)) / way.get("temperature", 1.0)
    if "top_k" in way:
        changed = np.array(top_k(changed.tolist(), way["top_k"]))
    return log_softmax(changed)


@pytest.fixture(scope="module")
def answers(demo: Served) -> Answers:
    """Each prompt in each way, of `/generate` and of `/v1/completions`: one seed, so the same tokens."""

    async def ask_all() -> Answers:
        async with httpx.AsyncClient(base_url=demo.url, timeout=300) as client:

            async def ask(prompt: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
                way = WAYS[name]
                native = {"max_new_tokens": TOKENS, "details": True, "top_n_tokens": TOP, **way}
                native |= {"do_sample": True} if way else {}
                openai = {"prompt": prompt, "max_tokens": TOKENS, "logprobs": TOP, "temperature": 0, **way}
                both = await asyncio.gather(
                    client.post("/generate", json={"inputs": prompt, "parameters": native}),
                    client.post("/v1/completions", json=openai),
                )
                assert [answer.status_code for answer in both] == [200, 200], [a.text for a in both]
                return both[0].json()["details"], both[1].json()["choices"][0]

            keys = [(prompt, name) for prompt in PROMPTS for name in WAYS]
            return dict(zip(keys, await asyncio.gather(*(ask(*key) for key in keys)), strict=True))

    return asyncio.run(ask_all())


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_log_probabilities_are_transformers(
    answers: Answers, tokenizer: TextTokenizer, reference: Reference, prompt: str, name: str
):
    native, openai = answers[prompt, name]
    start = tokenizer.encode(prompt)
    output = [token["id"] for token in native["tokens"]]
    logits = reference.logits([*start, *output])[len(start) - 1 :]
    shown = [token for token in native["tokens"] if not token["special"]]
    assert openai["text"] == "".join(token["text"] for token in shown)
    scores = openai["logprobs"]
    for i, token in enumerate(native["tokens"]):
        sampled = transformed(logits[i], WAYS[name], start, output[:i])
        assert token["logprob"] == pytest.approx(sampled[token["id"]], abs=TOLERANCE)
        likeliest = np.sort(sampled)[::-1][:TOP]
        top = native["top_tokens"][i]
        assert [one["logprob"] for one in top] == pytest.approx(likeliest.tolist(), abs=TOLERANCE)
        assert [one["logprob"] for one in top] == pytest.approx(
            [sampled[one["id"]] for one in top], abs=TOLERANCE
        )
    for i in range(len(shown)):
        own = log_softmax(logits[i])
        assert scores["token_logprobs"][i] == pytest.approx(own[output[i]], abs=TOLERANCE)
        likeliest = np.sort(own)[::-1][:TOP].tolist()
        # OpenAI's alternatives are keyed by text; the chosen token is among them, as one more if it was unlikely.
        told = sorted(scores["top_logprobs"][i].values(), reverse=True)
        assert told[: len(likeliest)] == pytest.approx(likeliest, abs=TOLERANCE)


def test_a_chats_log_probabilities_are_transformers(
    demo: Served, tokenizer: TextTokenizer, reference: Reference
):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {
        "messages": messages,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
    }
    choice = httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=300).json()["choices"][0]
    ids = tokenizer.encode(tokenizer.apply_chat(messages, None, True, False), add_special_tokens=False)
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == choice["message"]["content"]
    for token in content:
        own = log_softmax(reference.logits(ids)[-1])
        ids.append(int(own.argmax()))
        assert token["token"] == tokenizer.token_text(ids[-1])
        assert token["logprob"] == pytest.approx(own.max(), abs=TOLERANCE)
        told = [one["logprob"] for one in token["top_logprobs"]]
        assert told == pytest.approx(np.sort(own)[::-1][:TOP].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompts_log_probabilities_are_transformers(
    demo: Served, tokenizer: TextTokenizer, reference: Reference, prompt: str
):
    ids = tokenizer.encode(prompt)
    logits = reference.logits(ids)
    own = [float(log_softmax(logits[i])[token]) for i, token in enumerate(ids[1:])]

    native = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
    answer = httpx.post(f"{demo.url}/generate", json={"inputs": prompt, "parameters": native}, timeout=300)
    assert answer.status_code == 200, answer.text
    prefill = answer.json()["details"]["prefill"]
    assert [token["id"] for token in prefill] == ids
    assert prefill[0]["logprob"] is None
    assert [token["logprob"] for token in prefill[1:]] == pytest.approx(own, abs=TOLERANCE)

    openai = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    answer = httpx.post(f"{demo.url}/v1/completions", json=openai, timeout=300)
    assert answer.status_code == 200, answer.text
    scores = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert scores[0] is None
    assert scores[1 : len(ids)] == pytest.approx(own, abs=TOLERANCE)
