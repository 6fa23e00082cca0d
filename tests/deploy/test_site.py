"""The documentation: its reference pages are what the code says, its recipes run, and as a site it is whole and asks nobody."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.reference import FOLDER, PAGES
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import FakeEngine, fake_info
from tests.support.live_server import live_server
from xlane.server.backend import Backend
from xlane.server.cli import choose, settle
from xlane.server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
URL = "http://127.0.0.1:3000"


def recipes() -> list[tuple[str, str, str]]:
    """(heading, language, code) of each snippet, in order."""
    found: list[tuple[str, str, str]] = []
    for section in (ROOT / "docs" / "recipes.md").read_text().split("\n## ")[1:]:
        heading = section.split("\n", 1)[0]
        found += [
            (heading, *block)
            for block in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        ]
    return found


def run(language: str, code: str, url: str, folder: Path) -> str:
    """What a snippet prints, asked of the server at `url`. curl fails on what is no success."""
    code = code.replace(URL, url)
    command = [sys.executable, "-c", code]
    if language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", code.replace("curl -sS", "curl -sS --fail-with-body")]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def served(engine: FakeEngine, **config: object) -> tuple[Backend, ServerConfig]:
    backend = Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    return backend, ServerConfig(served_model_name="demo", **config)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Heading -> what each snippet below it printed, those for a shell first; files are left in one folder."""
    folder = tmp_path_factory.mktemp("recipes")
    shown: dict[str, list[str]] = {}
    shell = [(heading, code) for heading, language, code in recipes() if language == "bash"]
    python = [(heading, code) for heading, language, code in recipes() if language == "python"]
    engine = FakeEngine(fake_info(4096, 3000), obeys=True, cached_tokens=32)
    with live_server(*served(engine)) as server:
        for heading, code in shell:
            if heading != "Keys":
                shown.setdefault(heading, []).append(run("bash", code, server.url, folder))
        # In one process: the client takes longer to import than to ask.
        together = "print(end='\\0')\n".join(code for _, code in python)
        for (heading, _), text in zip(
            python, run("python", together, server.url, folder).split("\0"), strict=True
        ):
            shown.setdefault(heading, []).append(text)
    file, ask = (code for heading, code in shell if heading == "Keys")
    run("bash", file, "", folder)
    with live_server(*served(FakeEngine(), api_key_file=str(folder / "keys"))) as server:
        shown["Keys"] = [run("bash", ask, server.url, folder)]
    return shown


def test_every_recipe_does_what_it_says(printed: dict[str, list[str]]):
    curl, python = printed["Chat"]
    assert json.loads(curl)["usage"]["completion_tokens"] == 50
    assert len(python.strip()) == 50
    curl, python = printed["Streaming"]
    assert curl.endswith("data: [DONE]\n\n")
    assert len(python.strip()) == 50
    curl, python = printed["An answer that fits a JSON schema"]
    assert isinstance(json.loads(json.loads(curl)["choices"][0]["message"]["content"])["yes"], bool)
    assert re.fullmatch(r"yes=(True|False)\n", python)
    assert re.fullmatch(r"weather \{'rain': (True|False)\}\n", printed["Tools"][0])
    assert len(printed["Many prompts"][0].splitlines()) == 20
    assert 'key="bob",kind="generated"} 5.0' in printed["Keys"][0]
    assert re.fullmatch(r"(32 of \d+ prompt tokens were there\n){2}", printed["Prompts that begin alike"][0])
    assert re.search(r"^xlane_accepted_tokens_total 14.0$", printed["Guessing ahead"][0], re.MULTILINE)


@pytest.mark.parametrize(
    "line",
    [line[2:] for _, language, code in recipes() if language == "console" for line in code.splitlines()],
)
def test_every_command_of_a_recipe_is_understood(line: str):
    command, rest = choose(line.split()[1:])
    assert settle(command, rest, {}, {}).options.origins


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_is_what_the_code_says(name: str):
    assert (FOLDER / name).read_text() == PAGES[name](), "run `python -m tests.deploy.reference`"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path):
    navigation = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(navigation) == sorted(pages)
    for page in pages:
        built = site / ("index.html" if page == "index.md" else f"{page.removesuffix('.md')}/index.html")
        html = built.read_text()
        assert "<h1" in html
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', html)
        assert [url for pair in loaded for url in pair if "//" in url] == []
