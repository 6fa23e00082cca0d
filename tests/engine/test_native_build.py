"""Compiling the native CPU kernels: once, found again, never damaged, and a reason in words where it cannot be."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xlane.engine.kernels.native import build as building
from xlane.engine.kernels.native.build import COMPILERS, Built, build

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in COMPILERS),
    reason=f"needs a C++ compiler: one of {', '.join(COMPILERS)}",
)


@pytest.fixture
def tiny_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that compiles in no time, in the kernels' place."""
    source = tmp_path / "sources" / "tiny.cc"
    source.parent.mkdir()
    source.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }\n')
    (source.parent / "number.h").write_text("#define NUMBER 42\n")
    (source.parent / "other.cc").write_text('extern "C" int other() { return 7; }\n')
    monkeypatch.setattr(building, "_FOLDER", source.parent)
    return source


PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from xlane.engine.kernels.native.calls import NativeKernels, native_kernels
kernels = native_kernels(Path(sys.argv[1]))
assert isinstance(kernels, NativeKernels), kernels
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
x, weight = jnp.ones((3, 8)), jnp.full((2, 8, 16), 0.5)
compiled = jax.jit(kernels.linear, static_argnums=2).lower(x, weight, 20).compile()
print(float(compiled(x, weight).sum()), kernels.compile_s)
"""


@needs_compiler
def test_a_compiled_program_outlives_the_process(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The second process finds the library and the program, and compiles neither."""
    cache_dir = tmp_path_factory.getbasetemp().parent / "kernels"
    # Ahead of them both: what this process has registered may come from anywhere.
    assert isinstance(build(cache_dir), Built)
    command = [sys.executable, "-c", PROGRAM, str(cache_dir), str(tmp_path)]

    def run() -> tuple[str, set[str]]:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        return done.stdout, {path.name for path in tmp_path.iterdir() if not path.name.endswith("-atime")}

    first, programs = run()
    assert first == "240.0 0.0\n"
    assert any("linear" in name for name in programs)
    assert run() == (first, programs)


def test_no_compiler_is_a_reason(tmp_path: Path) -> None:
    reason = build(tmp_path, search=str(tmp_path))
    assert isinstance(reason, str)
    assert "no C++ compiler" in reason


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reason = build(tmp_path / "file" / "cache")
    assert isinstance(reason, str)
    assert "cannot write" in reason


@needs_compiler
def test_a_failing_compiler_is_a_reason(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'linear.cc:1: error: out of luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    reason = build(tmp_path / "cache", search=str(tmp_path))
    assert isinstance(reason, str)
    assert "status 3" in reason
    assert "out of luck" in reason
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
def test_built_once_then_found(tiny_source: Path, tmp_path: Path) -> None:
    first, again = build(tmp_path / "cache"), build(tmp_path / "cache")
    assert isinstance(first, Built)
    assert again == Built(first.path, 0)
    assert first.seconds > 0
    assert list((tmp_path / "cache").iterdir()) == [first.path]


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a matter of x86 processors")
def test_no_jump_lies_across_32_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A jump of two bytes behind 31 others is moved."""
    source = tmp_path / "sources" / "jump.cc"
    source.parent.mkdir()
    source.write_text('asm(".globl f; .p2align 5; f: .rept 31; nop; .endr; jz g; g: ret; .globl g");')
    monkeypatch.setattr(building, "_FOLDER", source.parent)
    built = build(tmp_path / "cache")
    assert isinstance(built, Built)
    library = ctypes.CDLL(str(built.path))
    begin, end = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in "fg")
    assert begin is not None
    assert end is not None
    assert end - begin > 31 + 2


@needs_compiler
def test_a_compiler_that_knows_no_such_option_is_asked_without_it(tiny_source: Path, tmp_path: Path) -> None:
    real = next(found for name in COMPILERS if (found := shutil.which(name)))
    other = tmp_path / "c++"
    other.write_text(f'#!/bin/sh\ncase "$*" in *32B*) exit 1;; esac\nexec {real} "$@"\n')
    other.chmod(0o755)
    assert isinstance(build(tmp_path / "cache", search=f"{tmp_path}:{os.environ['PATH']}"), Built)


@needs_compiler
def test_the_key_follows_what_the_code_depends_on(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = next(found for name in COMPILERS if (found := shutil.which(name)))
    keys = [building._key(compiler)]
    (tiny_source.parent / "number.h").write_text("#define NUMBER 43\n")
    keys.append(building._key(compiler))
    monkeypatch.setattr(building, "_cpu", lambda: "another machine")
    keys.append(building._key(compiler))
    assert len({*keys}) == 3


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_a_damaged_library_is_built_again(tiny_source: Path, tmp_path: Path, damage: str) -> None:
    first = build(tmp_path / "cache")
    assert isinstance(first, Built)
    content = first.path.read_bytes()
    half = len(content) // 2
    bad = {"empty": b"", "truncated": content[:half], "flipped": content[:half] + b"?" + content[half + 1 :]}[
        damage
    ]
    first.path.write_bytes(bad)
    again = build(tmp_path / "cache")
    assert isinstance(again, Built)
    assert again.path == first.path
    assert again.seconds > 0
    library = ctypes.CDLL(str(again.path))
    assert (library.answer(), library.other()) == (42, 7)
    found = build(tmp_path / "cache")
    assert isinstance(found, Built)
    assert found.seconds == 0
