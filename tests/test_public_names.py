"""The names each room offers to others: adding or dropping one is a decision, written down here."""

import importlib

import pytest

PUBLIC = {
    "xlane.engine": {
        "DURATION_EDGES_S", "MAX_GRAMMAR_BYTES", "MAX_LOGIT_BIAS", "MAX_TOP_LOGPROBS", "ROWS_EDGES", "DeadlineExceeded", "Engine",
        "EngineClient", "EngineConfig", "EngineError", "EngineInfo", "EngineLost", "EngineStats", "EngineStopped",
        "FinishReason", "Histogram", "InvalidRequest", "LaneStats", "LaunchStats", "LogprobsMode", "Overloaded", "PlanError", "ProgramInfo", "Request", "RequestFailed", "SamplingParams",
        "StepOutput", "Timing", "TokenOutput", "check_grammar", "check_prompt_scores", "compilers", "grammar_limits",
    },
    "xlane.models": set[str](),
    "xlane.sharding": set[str](),
    "xlane.server": {
        "LLM", "Call", "Completion", "Delta", "Incomplete", "Invalid", "NotReady", "Sampling", "ServerError",
        "TemplateFailed", "TextToken", "TooLong", "Unsupported", "UsageError",
    },
    "xlane.tpu": set[str](),
}  # fmt: skip

NO_SUCH = "no_such_name"


def exported(room: str) -> list[str]:
    return list(getattr(importlib.import_module(room), "__all__", []))


@pytest.mark.parametrize("room", PUBLIC)
def test_public_names(room: str):
    assert set(exported(room)) == PUBLIC[room]


@pytest.mark.parametrize("room", PUBLIC)
def test_every_public_name_is_there(room: str):
    module = importlib.import_module(room)
    missing = [name for name in exported(room) if not hasattr(module, name)]
    assert missing == []


@pytest.mark.parametrize("room", PUBLIC)
def test_no_public_name_twice(room: str):
    names = exported(room)
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("room", PUBLIC)
def test_an_unknown_name_is_an_attribute_error(room: str):
    with pytest.raises(AttributeError, match=NO_SUCH):
        getattr(importlib.import_module(room), NO_SUCH)
