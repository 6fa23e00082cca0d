"""`LLM` from start to stop with a real engine process; transformers is the witness of its tokens and its text."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from xlane.engine import PlanError
from xlane.server import LLM, Sampling

from ..support.fake_session import write_tokenizer
from ..support.tiny import hf_greedy, tiny_model

TEXTS = ("w5 w6 w7", "w99", "w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19")
SMALL = {
    "max_total_tokens": 32,
    "max_batch_size": 1,
    "max_batch_prefill_tokens": 8,
    "num_shard": 1,
    "kernels": "xla",
}
"""Few programs."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model("llama-gqa-tied", tmp_path_factory.mktemp("model"))
    write_tokenizer(path, 131)
    return path


def test_text_is_transformers(model: Path, tmp_path_factory: pytest.TempPathFactory):
    witness = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    expected = [hf_greedy(model, witness.encode(text), 6) for text in TEXTS]
    cache = tmp_path_factory.getbasetemp().parent / "kernels"
    sampling = Sampling(max_tokens=6, temperature=0)
    with LLM(str(model), progress=False, cache_dir=cache, **SMALL) as llm:
        assert llm.info.lanes == 1
        answers = llm.generate(TEXTS, sampling)
        streamed = list(llm.stream(witness.encode(TEXTS[0]), sampling))
    assert [[token.id for token in answer.tokens] for answer in answers] == expected
    assert [answer.text for answer in answers] == [witness.decode(ids) for ids in expected]
    assert "".join(delta.text for delta in streamed) == answers[0].text


def test_what_cannot_work_is_told_as_on_the_command_line(model: Path):
    with pytest.raises(PlanError, match="KV"):
        LLM(str(model), progress=False, cache_dir="none", **{**SMALL, "kv_bytes": 1})
