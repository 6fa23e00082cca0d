"""`xlane doctor` and `--dry-run`: what they say is what is so, and they leave nothing behind."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.support.stub_hub import StubHub, stub_hub
from tests.support.untrained import untrained_model
from xlane.engine import EngineConfig
from xlane.models import hub_fetch
from xlane.models.hub import hub_state
from xlane.server import cli, doctor, machine
from xlane.server.config import ServerConfig

CHOICES = ["--kernels", "xla", "--num-shard", "1", "--max-batch-size", "2"]
SMALL = ServerConfig()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with stub_hub({}) as running:
        yield running


def test_a_dry_run_decides_and_touches_nothing(model: Path, taken: int, capsys: pytest.CaptureFixture[str]):
    # The folder has no weights to load, and the port is another's: neither is noticed.
    line = ["serve", "--dry-run", str(model), *CHOICES, "--cache-dir", "none"]
    assert cli.run(line, {"PORT": str(taken), "API_KEY": "secret-7"}) == 0
    shown = capsys.readouterr().out
    rows = dict(row.strip().split("  ", 1) for row in shown.splitlines() if row.startswith("  "))
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["port"] == f"{taken}, from PORT"
    assert rows["kernels"] == "xla (asked for)"  # The decision, which comes after what was set.
    assert rows["max-batch-size"] == "2, from --max-batch-size"
    assert rows["api-key"] == "not shown, from API_KEY"
    assert rows["KV cache tokens"] == "128"  # Two lanes of the 64 that the model takes.
    assert "decode[2]" in rows["programs"]
    assert "hostname" not in rows


def test_a_dry_run_decides_for_each_of_several_models(model: Path, capsys: pytest.CaptureFixture[str]):
    line = [
        "serve",
        "--dry-run",
        str(model),
        "--more-models",
        f"twin={model}",
        *CHOICES,
        "--cache-dir",
        "none",
    ]
    assert cli.run(line, {}) == 0
    titles = [row for row in capsys.readouterr().out.splitlines() if row.startswith("would serve")]
    assert titles == [f"would serve {model}", "would serve twin"]


def test_a_dry_run_refuses_what_a_start_would(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "keys").write_text("one\n")
    for wrong, words in (
        (["--api-key-file", str(tmp_path / "keys")], "keys"),
        (["--ssl-certfile", "nowhere.pem"], "--ssl-certfile"),
        (["--hostname", "0.0.0.0"], "--insecure"),
        (["--more-models", "other", "--revision", "main"], "--revision=main is of one model"),
    ):
        assert cli.run(["serve", "--dry-run", str(model), *CHOICES, *wrong], {}) == 2
        assert words in capsys.readouterr().err


def test_a_machine_is_examined(model: Path, taken: int, hub: StubHub, tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "xlane.server",
        "doctor",
        str(model),
        "--json",
        "--port",
        str(taken),
        "--more-models",
        f"twin={model},lost={tmp_path}",
        *CHOICES,
    ]
    environ = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert not told["ok"]
    fits = [finding["found"] for finding in told["findings"] if finding["name"] == "fit"]
    assert [text.partition(": ")[0] for text in fits] == [str(model), "twin"], (
        "each of several, and not the first only"
    )
    models = [finding for finding in told["findings"] if finding["name"] == "model"]
    assert [(each["status"], "lost" in each["found"] or str(tmp_path) in each["found"]) for each in models] == [
        ("ok", False), ("ok", False), ("fail", True),
    ]  # fmt: skip
    found = {finding["name"]: finding for finding in told["findings"]} | {"model": models[0]}
    assert {name: finding["status"] for name, finding in found.items()} == {
        "versions": "ok", "variables": found["variables"]["status"], "access": "ok", "port": "fail", "hub": "ok",
        "cache": found["cache"]["status"], "models": found["models"]["status"], "model": "ok", "devices": "ok", "fit": "ok",
    }  # fmt: skip
    assert "choose another --port" in found["port"]["do"]
    assert found["hub"]["found"] == f"{hub.url} answers"
    assert [method for method, _, _ in hub.requests] == ["HEAD"]
    assert "2 lanes, 128 tokens" in found["fit"]["found"]
    assert "HF_TOKEN" in found["variables"]["found"]
    assert "hf_secret" not in done.stdout
    assert not (tmp_path / "hub").exists()


def test_the_hub_is_asked_where_it_is_configured_and_for_so_long(
    hub: StubHub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub_fetch.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_fetch.constants, "ENDPOINT", hub.url)
    state = hub_state(3)
    assert (state.offline, state.error, hub.requests) == (True, "", [])
    monkeypatch.setattr(hub_fetch.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(hub_fetch.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert hub_state(0.2).error
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("server", "status"),
    [
        (SMALL, "ok"),
        (ServerConfig(host="0.0.0.0"), "fail"),
        (ServerConfig(host="0.0.0.0", api_key="k"), "ok"),
        (ServerConfig(host="0.0.0.0", insecure=True), "ok"),
    ],
)
def test_who_may_come_in(server: ServerConfig, status: str):
    assert doctor.access(server).status == status


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    assert doctor.room("cache", tmp_path / "file", "--cache-dir").found.endswith("cannot be written")
    for free, status in ((3 * 10**9, "ok"), (10**9, "warn"), (10**7, "fail")):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert doctor.room("cache", tmp_path / "not" / "there", "--cache-dir").status == status
    assert not (tmp_path / "not").exists()


def test_a_folder_that_may_not_be_looked_into_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    found = doctor.room("cache", tmp_path / "closed", "--cache-dir")
    assert (found.status, found.do) == ("fail", "choose --cache-dir")
    assert found.found.endswith("closed: Permission denied")


def test_variables_that_matter():
    told = doctor.variables(
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "HOME": "/h", "XLANE_KEY": "s"}
    )
    assert told.status == "warn"
    assert told.found == "XLANE_KEY, XLA_FLAGS=--xla_force_host_platform_device_count=8"
    assert doctor.variables({"HOME": "/h"}).status == "ok"


def dies(told: Connection, engine: EngineConfig, models: machine.Plans) -> None:
    told.send(("devices", {"platform": "tpu", "kind": "TPU v5e", "count": 4}))
    os._exit(7)


def hangs(told: Connection, engine: EngineConfig, models: machine.Plans) -> None:
    time.sleep(60)


def refuses(told: Connection, engine: EngineConfig, models: machine.Plans) -> None:
    told.send(("devices", {"platform": "gpu", "kind": "H200", "count": 1}))
    for name in models:
        told.send(("unfit", {"name": name, "why": "needs 3 GB, has 2 GB\nat once"}))
    told.send(("end", None))


def seen(look: Any, models: machine.Plans | None = None) -> list[tuple[str, str, str]]:
    found = machine.machine(EngineConfig(model_id="m"), models or {}, look)
    return [(finding.name, finding.status, finding.found) for finding in found]


def test_a_device_that_kills_whoever_asks():
    assert seen(dies) == [
        ("devices", "ok", "4 x TPU v5e (tpu)"),
        ("fit", "fail", "who looked at it died (exit code 7)"),
    ]


def test_a_device_that_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(machine.TIMEOUTS_S, "devices", 0.05)
    assert [(name, status) for name, status, _ in seen(hangs)] == [("devices", "fail")]


def test_a_model_that_does_not_fit(tmp_path: Path):
    of = (EngineConfig(model_id="m"), tmp_path)
    assert seen(refuses, {"": of})[1:] == [("fit", "fail", "needs 3 GB, has 2 GB")]
    assert [found for *_, found in seen(refuses, {"m": of, "n": of})[1:]] == [
        f"{name}: needs 3 GB, has 2 GB" for name in "mn"
    ]


def test_an_accelerator_that_jax_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_ACCELERATORS", ((str(tmp_path), "NVIDIA GPU", "cuda"),))
    told = machine.judged("devices", {"platform": "cpu", "kind": "cpu", "count": 1})
    assert (told.status, told.do) == ("warn", "pip install 'xlane[cuda]', and unset JAX_PLATFORMS")


def test_without_a_compiler():
    told = machine.judged("kernels", {"name": "", "why": "no C++ compiler is on the PATH"})
    assert (told.status, told.do) == ("warn", "install g++ or clang++")
