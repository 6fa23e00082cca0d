"""/metrics against the list of TGI's metrics, our dashboard and our alerts: whatever is looked at is there."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from xlane.engine.replay import ReplayingClient
from xlane.server.config import ServerConfig
from xlane.server.engine_metrics import WITHOUT_MEANING

from .conftest import Rig

DOCS = Path(__file__).resolve().parents[2] / "docs"

TGI = {
    "tgi_request_count": ("counter", {}),
    "tgi_request_success": ("counter", {}),
    "tgi_request_failure": (
        "counter", {"err": {"overloaded", "validation", "template", "incomplete", "dropped", "generation"}}
    ),
    "tgi_request_duration": ("histogram", {}),
    "tgi_request_validation_duration": ("histogram", {}),
    "tgi_request_queue_duration": ("histogram", {}),
    "tgi_request_inference_duration": ("histogram", {}),
    "tgi_request_mean_time_per_token_duration": ("histogram", {}),
    "tgi_request_input_length": ("histogram", {}),
    "tgi_request_max_new_tokens": ("histogram", {}),
    "tgi_request_generated_tokens": ("histogram", {}),
    "tgi_request_skipped_tokens": ("summary", {"quantile": {"0", "0.5", "0.9", "0.95", "0.99", "0.999", "1"}}),
    "tgi_batch_inference_count": ("counter", {"method": {"prefill", "decode"}}),
    "tgi_batch_inference_success": ("counter", {"method": {"prefill", "decode"}}),
    "tgi_batch_inference_failure": ("counter", {"method": {"prefill", "decode"}}),
    "tgi_batch_inference_duration": ("histogram", {"method": {"prefill", "decode"}}),
    "tgi_batch_forward_duration": ("histogram", {"method": {"prefill", "decode"}}),
    "tgi_batch_decode_duration": ("histogram", {"method": {"prefill", "decode"}}),
    "tgi_batch_filter_duration": ("histogram", {"method": {"prefill", "decode"}}),
    "tgi_batch_concat_duration": ("histogram", {"method": {"decode"}}),
    "tgi_batch_concat": ("counter", {"reason": {"chunking"}}),
    "tgi_batch_next_size": ("histogram", {}),
    "tgi_batch_current_size": ("gauge", {}),
    "tgi_batch_current_max_tokens": ("gauge", {}),
    "tgi_queue_size": ("gauge", {}),
    "tgi_batch_max_total_tokens": ("gauge", {}),
}  # fmt: skip
"""Every metric of TGI, its type and the labels it has here."""

BOARD = """batch_concat batch_concat_duration batch_current_max_tokens batch_current_size batch_decode_duration
    batch_filter_duration batch_forward_duration batch_inference_duration queue_size request_count request_success
    request_failure request_duration request_generated_tokens request_input_length
    request_mean_time_per_token_duration request_queue_duration request_skipped_tokens""".split()  # noqa: SIM905
"""What TGI's own dashboard looks at."""


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(api_key="k")


@pytest.fixture
def rig(rig: Rig) -> Rig:
    rig.client.headers["authorization"] = "Bearer k"
    rig.backend.engines = {"serving": 2, "draining": 0, "away": 1, "refused": 0}
    rig.client.app.state.certificate = SimpleNamespace(left_s=9.5)  # pyright: ignore[reportFunctionMemberAccess]
    return rig


def used(rig: Rig) -> str:
    rig.generate(max_new_tokens=3)
    rig.generate(temperature=0)
    return rig.client.get("/metrics").text


def sample_names(text: str) -> set[str]:
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}


@pytest.mark.parametrize("name", TGI)
def test_tgis_metrics_are_there_or_said_to_be_missing(rig: Rig, name: str):
    text, (kind, labels) = used(rig), TGI[name]
    if name in WITHOUT_MEANING:
        assert name not in text
        return
    assert f"# TYPE {name} {kind}" in text.splitlines()
    assert name + {"histogram": "_bucket", "summary": "_count"}.get(kind, "") in sample_names(text)
    for label, values in labels.items():
        found = set(re.findall(rf'^{name}\w*{{.*\b{label}="([^"]*)"', text, re.MULTILINE))
        assert values <= found


def test_nothing_is_missing_that_is_not_in_the_list():
    assert set(WITHOUT_MEANING) <= set(TGI)
    assert {name for name in BOARD if f"tgi_{name}" in WITHOUT_MEANING} == {"batch_concat_duration"}


def test_the_text_is_prometheus(rig: Rig):
    families = {family.name: family for family in text_string_to_metric_families(used(rig))}
    assert families["xlane_ready"].samples[0].value == 1
    assert families["xlane_lanes_total"].samples[0].value == 8
    info = families["xlane_info"].samples[0].labels
    assert info == {"model_id": "fake/alphabet", "version": "0.0", "platform": "cpu", "dtype": "float32"}
    names = [line.split()[2] for line in used(rig).splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert families["xlane_tls_certificate_seconds"].samples[0].value == 9.5


def values(text: str) -> dict[str, float]:
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line[0] != "#"
    }


def test_what_is_counted(rig: Rig):
    found = values(used(rig))
    assert found['tgi_batch_decode_duration_count{method="prefill"}'] == 1
    assert found['tgi_batch_decode_duration_count{method="decode"}'] == 2
    assert found['tgi_request_failure{err="validation"}'] == 1
    assert found['tgi_request_failure{err="overloaded"}'] == 0
    assert found["xlane_requests_in_flight"] == 0


@pytest.mark.parametrize("tokens_per_step", [1, 2, 4])
def test_times_are_told_of_what_a_stop_string_ended(rig: Rig, tokens_per_step: int):
    rig.engine.delay_s, rig.engine.tokens_per_step = 0.01, tokens_per_step
    answer = rig.chat(max_tokens=9, temperature=0, stop=["d"])
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    steps = 4 // tokens_per_step - 1
    told = {name: int(answer.headers[f"x-{name}-time"]) for name in ("queue", "inference", "total")}
    assert told["queue"] == 1
    assert 9 * steps <= told["inference"] + told["queue"] <= told["total"] + 2
    found = values(rig.client.get("/metrics").text)
    for name in ("queue_duration", "inference_duration", "mean_time_per_token_duration"):
        assert found[f"tgi_request_{name}_count"] == 1
    assert found["tgi_request_inference_duration_sum"] >= 0.009 * steps


ANSWERED = (
    ("/generate", "native", {"inputs": "a", "parameters": {"max_new_tokens": 2}}),
    ("/v1/chat/completions", "openai_chat", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/completions", "openai_completions", {"prompt": "a"}),
    ("/v1/responses", "responses", {"input": "a"}),
    ("/v1/messages", "anthropic", {"messages": [{"role": "user", "content": "a"}]}),
    ("/vertex", "instances", {"instances": [{"inputs": "a", "parameters": {"max_new_tokens": 2}}]}),
)
"""Routes, and who makes their answers."""


@pytest.mark.parametrize(("path", "module", "body"), ANSWERED)
def test_what_could_not_be_answered_was_no_success(
    rig: Rig, path: str, module: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Any:
        raise ValueError("not to be written")

    monkeypatch.setattr(f"xlane.server.{module}.{'answer_of' if module == 'native' else '_answer'}", fail)
    assert rig.post(path, **{"max_tokens": 2, **body}).status_code == 500
    found = values(rig.client.get("/metrics").text)
    assert (found["tgi_request_success"], found['tgi_request_failure{err="internal"}']) == (0, 1)


def test_what_the_engine_counted(rig: Rig):
    found = values(used(rig))
    for name in ("count", "success"):
        assert found[f'tgi_batch_inference_{name}{{method="prefill"}}'] == 1
        assert found[f'tgi_batch_inference_{name}{{method="decode"}}'] == 7
    for name, prefill_s, decode_s in (("inference", 0.125, 4), ("forward", 0.25, 5), ("filter", 0.375, 6)):
        place = f"tgi_batch_{name}_duration"
        assert found[f'{place}_sum{{method="prefill"}}'] == prefill_s
        assert found[f'{place}_sum{{method="decode"}}'] == decode_s
        assert found[f'{place}_bucket{{le="0.00015",method="decode"}}'] == 2
        assert found[f'{place}_bucket{{le="0.000225",method="decode"}}'] == 7
        assert found[f'{place}_bucket{{le="+Inf",method="decode"}}'] == 7
    assert found['tgi_batch_next_size_bucket{le="1.0"}'] == 0
    assert found['tgi_batch_next_size_bucket{le="2.0"}'] == 1
    assert found['tgi_batch_concat{reason="chunking"}'] == 3
    skipped = "tgi_request_skipped_tokens"  # 2, 3, 3, 3, 3
    assert (found[f"{skipped}_count"], found[f"{skipped}_sum"]) == (5, 14)
    assert [found[f'{skipped}{{quantile="{part}"}}'] for part in ("0", "0.5", "0.999", "1")] == [2, 3, 3, 3]
    assert (found["xlane_guessed_tokens_total"], found["xlane_accepted_tokens_total"]) == (20, 14)


def test_restarts_replays_and_readiness(rig: Rig):
    replaying = ReplayingClient(rig.engine)
    replaying.replays = 2
    rig.backend.ready(replaying, rig.backend.serving().tokenizer, rig.engine.info_value)
    rig.backend.restarts = 3
    found = values(used(rig))
    assert (found["xlane_replays_total"], found["xlane_engine_restarts_total"]) == (2, 3)
    rig.backend.down("gone")
    assert values(rig.client.get("/metrics").text)["xlane_ready"] == 0


def test_several_engines_are_told_of_by_state(rig: Rig):
    found = values(used(rig))
    assert (found['xlane_engines{state="serving"}'], found['xlane_engines{state="away"}']) == (2, 1)
    rig.backend.engines = {}
    assert "xlane_engines" not in rig.client.get("/metrics").text


def queried(node: Any) -> set[str]:
    """All metrics that the expressions in a dashboard or a rule file name."""
    if isinstance(node, list):
        return set().union(*map(queried, node))
    if not isinstance(node, dict):
        return set()
    found: set[str] = set()
    for key, value in node.items():
        if key in ("expr", "query", "definition") and isinstance(value, str):
            found |= set(re.findall(r"\b(?:tgi|xlane)_\w+", value))
        else:
            found |= queried(value)
    return found


@pytest.mark.parametrize("name", ["grafana.json", "alerts.yaml"])
def test_every_metric_that_is_looked_at_exists(rig: Rig, name: str):
    text = (DOCS / name).read_text()
    looked_at = queried(json.loads(text) if name.endswith("json") else yaml.safe_load(text))
    assert len(looked_at) >= 8
    assert looked_at - sample_names(used(rig)) == set()


def test_models_that_nobody_asks_for_are_no_alarm():
    alerts, board = (DOCS / "alerts.yaml").read_text(), (DOCS / "grafana.json").read_text()
    by_instance = "max by (instance) (xlane_ready"
    assert alerts.count("xlane_ready") == alerts.count(f"{by_instance}) == 0") == 1
    assert board.count("xlane_ready") == board.count(by_instance) == 1


def test_every_metric_of_ours_is_on_the_board(rig: Rig):
    board = queried(json.loads((DOCS / "grafana.json").read_text()))
    ours = {re.sub("_(bucket|sum|count)$", "", n) for n in sample_names(used(rig)) if n.startswith("xlane_")}
    shown = {re.sub("_bucket$", "", name) for name in board}
    assert ours - shown == {"xlane_info"}


def test_panels_do_not_lie_on_each_other():
    panels = json.loads((DOCS / "grafana.json").read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
