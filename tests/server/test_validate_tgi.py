"""TGI's parameters: sentences in TGI's words, greedy or sampled, lengths."""

from typing import Any

import pytest

from xlane.engine import LogprobsMode
from xlane.server.config import ServerConfig
from xlane.server.errors import Invalid
from xlane.server.schema_tgi import GenerateParameters
from xlane.server.validate import Checked, derive_seed, requests_of
from xlane.server.validate_tgi import check_inputs, check_length, check_parameters

from ..support.fake_engine import fake_info


def check(*, streaming: bool = False, **parameters: Any) -> Checked:
    return check_parameters(GenerateParameters(**parameters), ServerConfig(), (2,), streaming=streaming)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        (
            {"best_of": 2, "do_sample": True, "streaming": True},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"temperature": 1e300}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": -1.0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 0.0}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"typical_p": 1.1}, "`typical_p` must be > 0.0 and <= 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a"] * 65}, "`stop` supports up to 64 stop sequences. Given: 65"),
        ({"stop": [""]}, "`stop` sequences must have between 1 and 1000 characters"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"seed": -1}, "`seed` must be >= 0 and <= 18446744073709551615"),
    ],
)
def test_refusals(parameters: dict[str, Any], sentence: str):
    with pytest.raises(Invalid) as caught:
        check(**parameters)
    assert str(caught.value) == sentence


def test_what_asks_for_nothing_is_accepted():
    checked = check(watermark=False, decoder_input_details=False, grammar=None, adapter_id=None, best_of=1)
    assert not checked.sampling.watermark
    assert checked.prompt_logprobs is None


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 1.0}, 0.0),
        ({"top_p": 1.0, "typical_p": 1.0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"typical_p": 0.9}, 1.0),
        ({"do_sample": True, "temperature": 1e-9}, 0.0),
    ],
)
def test_greedy_unless_sampling_is_asked_for(parameters: dict[str, Any], temperature: float):
    checked = check(**parameters)
    assert checked.sampling.temperature == temperature
    assert checked.sampled == (temperature > 0)


def test_logprobs_are_computed_only_where_they_are_shown():
    assert not check(top_n_tokens=2).sampling.logprobs
    assert check(details=True, top_n_tokens=2).sampling.top_logprobs == 2
    assert check(streaming=True).sampling.logprobs
    assert check(streaming=True).sampling.logprobs_mode is LogprobsMode.PROCESSED


def test_a_seed_is_kept_and_a_missing_one_is_random():
    assert check(seed=2**64 - 1).sampling.seed == 2**64 - 1
    assert check().sampling.seed != check().sampling.seed


def test_sequences_of_a_request_have_seeds_and_ids_of_their_own():
    first, second = requests_of(check(best_of=2, do_sample=True), [1], 5)
    assert first.id != second.id
    assert first.sampling.seed != second.sampling.seed
    assert second.sampling.seed == derive_seed(first.sampling.seed, 1)
    assert second.sampling.max_tokens == 5


INFO = fake_info(max_total_tokens=2000, max_input_tokens=1500)


@pytest.mark.parametrize(
    ("prompt", "asked", "granted"),
    [(10, 20, 20), (10, None, 1990), (10, 100_000, 1990), (1500, None, 500), (1500, 500, 500)],
)
def test_lengths_that_fit(prompt: int, asked: int | None, granted: int):
    assert check_length(prompt, asked, INFO) == granted


def test_lengths_that_do_not_fit():
    with pytest.raises(Invalid) as caught:
        check_length(1000, 1500, INFO)
    assert str(caught.value) == (
        "`inputs` tokens + `max_new_tokens` must be <= 2000. "
        "Given: 1000 `inputs` tokens and 1500 `max_new_tokens`"
    )
    with pytest.raises(Invalid) as caught:
        check_length(1501, 10, INFO)
    assert str(caught.value) == "`inputs` must have less than 1500 tokens. Given: 1501"


def test_inputs():
    with pytest.raises(Invalid, match="`inputs` cannot be empty"):
        check_inputs("", None, INFO)
    for truncate in (0, 1501):
        with pytest.raises(Invalid, match=f"less than 1500. Given: {truncate}"):
            check_inputs("a", truncate, INFO)
