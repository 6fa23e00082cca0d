"""Compiles the kernels beside it for the machine at hand and keeps the result.

Knows compilers and files; does not load the library and does not know what is in it. The file name carries a hash of
everything the machine code depends on, and the file ends in a hash of itself: a cached library is never stale, and a
damaged one is compiled again rather than loaded, which could kill the process. Importing does nothing.
"""

import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-pthread", "-w")
"""-ffp-contract=fast: one rounding per multiply-add, everywhere alike. -ffast-math would reorder sums; never here."""
BRANCHES = ("-Wa,-mbranches-within-32B-boundaries", "-mbranches-within-32B-boundaries")
"""How GNU's assembler and clang are told that no jump may lie across 32 bytes. From Skylake to Cascade Lake the code round such
a jump is decoded anew each time it runs (Intel's "jump conditional code erratum"): a product took 5 to 9 % longer or not by
where its loop happened to be put. Other machines' compilers know neither."""
TIMEOUT_S = 300
AT_ONCE = 4
"""Compilers, at most: each takes some 400 MB."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Built:
    """A library that is ready to load."""

    path: Path
    seconds: float
    """What compiling took; 0 when it was found in the cache."""


def build(cache_dir: Path, *, search: str | None = None) -> Built | str:
    """Return the compiled kernels, or why there are none.

    Args:
        cache_dir: where libraries are kept; made if missing.
        search: where compilers are looked for, in the form of PATH; None is the process's own.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name, path=search))), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(COMPILERS)}) is on the PATH; install g++ or clang++"
    path = cache_dir / f"xlane-native-{_key(compiler)}.so"
    if _intact(path):
        return Built(path, 0.0)
    return _compile(compiler, path)


def _intact(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _key(compiler: str) -> str:
    files = sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cc", ".h"))
    sources = [path.read_text(encoding="utf-8") for path in files]
    flags = " ".join((*FLAGS, *BRANCHES))
    parts = (*sources, _output([compiler, "--version"]), flags, version("jaxlib"), _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What -march=native looks at. The flags count too: two machines of one model may hide different ones."""
    try:
        lines = (
            Path("/proc/cpuinfo")
            .read_text(encoding="utf-8", errors="replace")
            .split("\n\n", 1)[0]
            .splitlines()
        )
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(wanted))])


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _branches(compiler: str, folder: str) -> list[str]:
    """The first of BRANCHES that this compiler knows, if any."""
    nothing = [compiler, "-c", "-x", "c++", os.devnull, "-o", f"{folder}/nothing.o"]
    known = (flag for flag in BRANCHES if _succeeds([*nothing, flag]))
    return [*itertools.islice(known, 1)]


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _compile(compiler: str, path: Path) -> Built | str:
    start = time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.stem, suffix=".partial") as folder:
            reason = _link(compiler, folder, f"{folder}/library")
            if reason is not None:
                return reason
            _keep(Path(folder, "library"), path)
    except OSError as error:
        return f"cannot write to {path.parent}: {error.strerror}"
    return Built(path, time.perf_counter() - start)


def _link(compiler: str, folder: str, library: str) -> str | None:
    """Compile each source by itself, side by side, and make a library of them -> why that failed."""
    flags = [*FLAGS, *_branches(compiler, folder), "-isystem", jax.ffi.include_dir()]
    sources = sorted(_FOLDER.glob("*.cc"), key=lambda source: -source.stat().st_size)
    objects = [f"{folder}/{source.stem}.o" for source in sources]
    commands = [[compiler, *flags, "-c", str(source), "-o", to] for source, to in zip(sources, objects)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, AT_ONCE)) as several:
        reasons = [*several.map(_reason, commands)]
    link = [compiler, "-shared", "-pthread", *objects, "-o", library]
    return next(filter(None, reasons), None) or _reason(link)


def _reason(command: list[str]) -> str | None:
    """Run a compiler -> why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not finish within {TIMEOUT_S} s"
    except OSError as error:
        return f"{command[0]} could not be run: {error.strerror}"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    return f"{command[0]} failed with status {done.returncode}: {first}"


def _keep(library: Path, path: Path) -> None:
    with library.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)  # behind the end of the ELF file, where nobody else looks
    # Whoever else compiles the same thing at this moment gets the same file: last one in wins, nobody sees a half.
    os.replace(library, path)
