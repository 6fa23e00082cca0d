"""The native CPU kernels as JAX sees them: `Kernels` by way of XLA's FFI.

Knows the library's functions and their shapes; not how they work (`native.cc`) nor how they were compiled (`build.py`).
float32 only, one device only. Importing does nothing: `native_kernels` compiles, loads and registers.
"""

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ...models.kernels import KvLayer, PagedBatch
from ...models.spec import PANEL
from .build import build

# Part of every compiled program that calls them, also of those in the persistent cache: count up when a signature changes.
LINEAR = "xlane_linear.1"
GROUPED = "xlane_grouped.1"
ATTEND = "xlane_attend.3"

_lock = threading.Lock()
_registered: list["NativeKernels"] = []  # XLA takes a target's name once per process


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """`models.kernels.Kernels`, computed by `native.cc`. A row's result is the same bits whatever shares its launch."""

    name: str
    compile_s: float
    """What compiling the library took at this start; 0 when it was found in the cache."""
    packed: bool = True
    placement: None = None
    """These compute on one device."""

    def linear(self, x: jax.Array, weight: jax.Array, outputs: int) -> jax.Array:
        """x float32[T, D] times weight float32[panels, D, 16] -> float32[T, outputs]."""
        _require_float32("linear", x=x, weight=weight)
        if x.ndim != 2 or weight.shape != (-(-outputs // PANEL), x.shape[1], PANEL):
            raise ValueError(f"linear: x {x.shape} and weight {weight.shape} do not give {outputs} outputs")
        return jax.ffi.ffi_call(LINEAR, jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype))(x, weight)

    def grouped_linear(self, x: jax.Array, weight: jax.Array, sizes: jax.Array, outputs: int) -> jax.Array:
        """x float32[S, D] in groups of `sizes` int32[X], weight float32[X, panels, D, 16] -> float32[S, outputs]."""
        _require_float32("grouped_linear", x=x, weight=weight)
        if weight.shape != (sizes.shape[0], -(-outputs // PANEL), x.shape[1], PANEL):
            raise ValueError(
                f"grouped_linear: x {x.shape} and weight {weight.shape} do not give {outputs} outputs"
            )
        call = jax.ffi.ffi_call(GROUPED, jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype))
        return call(x, weight, sizes)

    def attend(
        self,
        qkv: jax.Array,
        kv: KvLayer,
        batch: PagedBatch,
        *,
        window: int | None,
        scale: float,
        one_token_rows: bool,
        softcap: float | None = None,
        slopes: tuple[float, ...] = (),
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, KvLayer]:
        """Write the keys and values of qkv float32[T, K, G+2, H] into their pages in place, then attend its queries.

        `one_token_rows` is not needed: the kernel finds the runs of tokens itself.
        """
        _require_float32("attend", qkv=qkv, k_pool=kv.k, v_pool=kv.v)
        if sinks is not None:
            _require_float32("attend", sinks=sinks)
        del one_token_rows
        tokens, kv_heads, members, head_dim = qkv.shape
        out = jax.ShapeDtypeStruct((tokens, kv_heads * (members - 2), head_dim), qkv.dtype)
        results = (out, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kv))
        call = jax.ffi.ffi_call(ATTEND, results, input_output_aliases={1: 1, 2: 2})
        arguments = (qkv, kv.k, kv.v, batch.positions, batch.rows, batch.table)
        out, k_pool, v_pool = call(
            *arguments,
            *(() if sinks is None else (sinks,)),
            window=np.int64(window or 0),
            scale=np.float32(scale),
            softcap=np.float32(softcap or 0.0),
            slopes=np.array(slopes, np.float32),
        )
        return out, KvLayer(k_pool, v_pool)


def native_kernels(cache_dir: Path) -> NativeKernels | str:
    """Compile (or find), load and register the kernels; a string says why they cannot be had.

    The first success serves the whole process, whatever `cache_dir` a later call names.
    """
    with _lock:
        if not _registered:
            kernels = _load(cache_dir)
            if isinstance(kernels, str):
                return kernels
            _registered.append(kernels)
        return _registered[0]


def _load(cache_dir: Path) -> NativeKernels | str:
    built = build(cache_dir)
    if isinstance(built, str):
        return built
    try:
        library = ctypes.CDLL(str(built.path))
    except OSError as error:
        return f"the compiled kernels do not load: {error}"
    for target, symbol in ((LINEAR, "xlane_linear"), (GROUPED, "xlane_grouped"), (ATTEND, "xlane_attend")):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    library.xlane_isa.restype = ctypes.c_char_p
    return NativeKernels(name=f"native ({library.xlane_isa().decode()})", compile_s=built.seconds)


def _require_float32(function: str, **arrays: jax.Array) -> None:
    for name, array in arrays.items():
        if array.dtype != jnp.float32:
            raise TypeError(f"{function}: the native kernels compute in float32, {name} is {array.dtype}")
