"""`xlane serve --more-models` from start to stop: two real engines, one in memory at a time; transformers is the witness."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ..server.test_session import RunningServer
from ..support.fake_session import write_tokenizer
from ..support.tiny import hf_greedy, tiny_model
from .test_llm import SMALL

PROMPT = [5, 6, 7]
TOKENS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found = [tiny_model(kind, tmp_path_factory.mktemp("models")) for kind in ("llama-gqa-tied", "llama-mha")]
    for path in found:
        write_tokenizer(path, 131)
    return found


@pytest.fixture
def server(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    cache = tmp_path_factory.getbasetemp().parent / "kernels"
    served = RunningServer(
        [sys.executable, "-m", "xlane.server", "serve", str(models[0]), f"--more-models=second={models[1]}", "--port=0",
         "--json-output", f"--cache-dir={cache}", "--limit=model_wait_s=300", *options]
    )  # fmt: skip
    yield served.ready()
    served.process.kill()
    served.process.wait()


def test_each_model_answers_for_itself(server: RunningServer, models: list[Path]):
    names = {str(models[0]): models[0], "second": models[1]}
    expected = {
        name: "".join(f"w{token}" for token in hf_greedy(path, PROMPT, TOKENS))
        for name, path in names.items()
    }
    assert len(set(expected.values())) == 2
    for name in (str(models[0]), "second"):
        body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).json()
        assert (answer["choices"][0]["text"], answer["model"]) == (expected[name], name)
        states = {m["id"]: m["state"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]}
        assert states == {other: "loaded" if other == name else "not loaded" for other in names}
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
