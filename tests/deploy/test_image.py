"""The Dockerfile, rehearsed without docker: what it copies builds a wheel, what it starts is there and reads its variables."""

import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from xlane.server import flags
from xlane.server.cli import Settings, choose, settle

from .dockerfile import Stage, read

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD, IMAGE = read(ROOT / "Dockerfile")


def launch(*argv: str, **environ: str) -> Settings:
    """What the entry point makes of a container's arguments and variables."""
    command, rest = choose(["serve", *argv])
    container = {"HOSTNAME": "3f2a9c1d5b7e"}
    return settle(command, rest, container | IMAGE.environment() | environ, flags.TGI_DEFAULTS)


def copied(stage: Stage) -> list[tuple[str, str]]:
    """(source in the build context, target) of each COPY that is not of another stage."""
    copies = [found.words for found in stage.all("COPY") if "from" not in found.options]
    return [(source, words[-1]) for words in copies for source in words[:-1]]


def in_context(source: str) -> bool:
    """Whether `.dockerignore`, which names what may come, lets a path through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return "*" in lines and f"!{source}" in lines


def test_it_is_lint_free():
    subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)


def test_what_it_copies_is_there_and_nothing_else_travels():
    sources = [source for source, _ in copied(BUILD) + copied(IMAGE)]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not in_context(source)] == []
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(allowed) == sorted(sources)


def test_what_it_copies_builds_the_package_whole(tmp_path: Path):
    source, wheels = tmp_path / "src", tmp_path / "wheels"
    for name, target in copied(BUILD):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        else:
            (source / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / target)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", wheels, source], check=True)
    [wheel] = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    rooms = ("engine", "models", "server", "sharding", "tpu")
    modules = {f"xlane/{path.relative_to(ROOT)}" for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "xlane/tpu/requirements-tpu.lock" in names  # which a TPU host installs first of all


@pytest.mark.parametrize("extra", ["cuda", "tpu", ""])
def test_it_installs_what_is_locked_and_then_itself_alone(extra: str):
    [install] = [run.rest for run in BUILD.all("RUN") if "pip install" in run.rest]
    locked, itself = (command.split("pip install ")[1] for command in install.split(" && "))
    shell = subprocess.run(
        ["bash", "-c", "echo " + locked], env={"EXTRA": extra}, capture_output=True, text=True, check=True
    )
    assert shell.stdout.split() == [
        "--require-hashes",
        "--requirement",
        f"tpu/requirements-{extra or 'cpu'}.lock",
    ]
    assert (ROOT / shell.stdout.split()[-1]).is_file()
    assert itself.split() == ["--no-deps", "--no-build-isolation", "."]


def test_the_python_it_names_is_one_the_package_runs_on():
    assert BUILD.base == IMAGE.base == "python:${PYTHON}-slim-bookworm"
    found = re.search(r"^ARG PYTHON=3\.(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    assert PROJECT["requires-python"] == ">=3.11"
    assert int(found[1]) >= 11


def test_it_starts_as_tgis_image_does():
    [entry] = IMAGE.all("ENTRYPOINT")
    assert entry.words == ["text-generation-launcher"]
    assert PROJECT["scripts"][entry.words[0]] == "xlane.server.cli:launcher"
    assert IMAGE.all("CMD") == []
    settings = launch()
    assert (settings.server.host, settings.server.port) == ("0.0.0.0", 80)
    assert settings.server.insecure  # else it would not start without a key
    assert settings.engine.cache_dir == "/data/xlane"
    assert IMAGE.environment()["HF_HOME"] == "/data"
    assert [found.rest for found in IMAGE.all("EXPOSE")] == ["80"]
    assert [found.rest for found in IMAGE.all("VOLUME")] == ["/data"]


def test_a_command_of_a_tgi_compose_file_works():
    settings = launch(
        "--model-id", "o/m", "--num-shard", "2", "--json-output", "--max-total-tokens=4096", "--port", "8080",
        MAX_CONCURRENT_REQUESTS="64", HUGGINGFACE_HUB_CACHE="/data", HF_TOKEN="t", API_KEY="",
    )  # fmt: skip
    assert (settings.engine.model_id, settings.engine.model_parallel) == ("o/m", 2)
    assert (settings.server.port, settings.server.max_concurrent_requests) == (8080, 64)
    assert (settings.run.hub_cache, settings.run.json_output) == ("/data", True)
    assert settings.server.api_key is None


def test_it_does_not_run_as_root():
    assert IMAGE.all("USER")[-1].rest == "1000"
    assert any("useradd --uid 1000 " in run.rest and "/data" in run.rest for run in IMAGE.all("RUN"))


def probe(status: int) -> int:
    """The health check's exit code beside a server that answers `/health` with this status."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    [check] = IMAGE.all("HEALTHCHECK")
    _, _, command = check.rest.partition("CMD ")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        python, *rest = json.loads(command)
        assert python == "python"
        return subprocess.run(
            [sys.executable, *rest], env={"PORT": str(server.server_port)}, check=False
        ).returncode
    finally:
        server.shutdown()
        server.server_close()


def test_its_health_check_follows_the_server():
    assert probe(200) == 0
    assert probe(503) == 1
