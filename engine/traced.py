"""What was traced, kept between starts: to read a program's text takes a fifth of the time that tracing it takes.

The text is StableHLO, as `jax.export` writes it, and is read only by the very code and version of jax that wrote it. Knows
how a function becomes a file; not what it computes.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import jax
from jax import export

from .identity import depends_on, source_digest
from .step import Blueprint

# That a text means the same to another version of jax, or of a kernel, is what these checks are for.
_ONLY_THIS_VERSION = (export.DisabledSafetyCheck.custom_call("ALL"),)
_TRACED_UNDER = ("jax_default_matmul_precision", "jax_enable_x64", "jax_threefry_partitionable")


class TracedTexts:
    """The texts of one blueprint's programs in a folder."""

    def __init__(self, folder: Path, blueprint: Blueprint) -> None:
        depends = depends_on(blueprint, f"{jax.__version__} {version('jaxlib')}")
        depends |= {"source": source_digest(), **{name: getattr(jax.config, name) for name in _TRACED_UNDER}}
        key = json.dumps(depends, sort_keys=True, default=str).encode()
        self._stem = hashlib.sha256(key).hexdigest()[:16]
        self._folder = folder

    def function(self, name: str, function: Callable[..., Any], args: Any, out: Any) -> Callable[..., Any]:
        """What `function` is for these abstract arguments, with its results shaped like the tree `out`; traced only if no
        text of this name can be read."""
        leaves, in_tree = jax.tree.flatten(args)
        out_tree = jax.tree.structure(out)
        path = self._folder / f"{self._stem}-{name}.stablehlo"
        text = _read(path)
        if text is None:

            def flat(*leaves: Any) -> list[Any]:
                return out_tree.flatten_up_to(function(*in_tree.unflatten(leaves)))

            traced = export.export(jax.jit(flat), disabled_checks=_ONLY_THIS_VERSION)(*leaves)
            data = traced.serialize()
            with contextlib.suppress(OSError):  # a warmed cache may be mounted read-only, and serves as well
                write_whole(path, bytes(data))
            # Read back, so that this start compiles what the next ones will.
            text = export.deserialize(data)

        def call(*args: Any) -> Any:
            return out_tree.unflatten(text.call(*jax.tree.leaves(args)))

        return call


def _read(path: Path) -> export.Exported | None:
    """None if there is nothing, or nothing that can be read."""
    try:
        return export.deserialize(bytearray(path.read_bytes()))
    except Exception:  # whatever the bytes make its reader stumble over, tracing is the answer
        return None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen in part: engines that start at once over one folder each write their own, and the
    last to finish stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as temporary:
        temporary.write(content)
    Path(temporary.name).chmod(0o644)
    Path(temporary.name).replace(path)
