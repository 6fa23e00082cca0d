"""The native CPU kernels as JAX sees them: `Kernels` by way of XLA's FFI.

Knows the library's functions and their shapes; not how they work nor how they were compiled (`build.py`).
float32 only, one device only. Importing does nothing: `native_kernels` compiles, loads and registers.
"""

import ctypes
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ....models import rowwise
from ....models.attention import XlaKernels
from ....models.config import Activation
from ....models.kernels import AnyPool, KvLayer, PagedBatch, Weight
from ....models.spec import PANEL, Quantized
from .build import build

# Part of every compiled program that calls them, also of those in the persistent cache: count up when a signature changes.
LINEAR = "xlane_linear.1"
LINEAR8 = "xlane_linear8.2"
LINEAR4 = "xlane_linear4.2"
GROUPED = "xlane_grouped.1"
GROUPED8 = "xlane_grouped8.2"
GROUPED4 = "xlane_grouped4.2"
ATTEND = "xlane_attend.4"
ATTEND8 = "xlane_attend8.2"
RMS_NORM = "xlane_rms_norm.1"
GATED = "xlane_gated.1"
ARGMAX = "xlane_argmax.1"
TARGETS = (
    LINEAR, LINEAR8, LINEAR4, GROUPED, GROUPED8, GROUPED4, ATTEND, ATTEND8, RMS_NORM, GATED, ARGMAX
)  # fmt: skip

SIGMOIDS = {
    "silu": (1.0, 0.0),
    "gelu_sigmoid": (1.702, 0.0),
    # 1 + tanh(z) is twice the sigmoid of 2 z.
    "gelu_tanh": (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715),
}
"""Activations of the form g sigmoid(a g + b g^3): a and b."""

_lock = threading.Lock()
_registered: list["NativeKernels"] = []  # XLA takes a target's name once per process


@dataclass(frozen=True, slots=True)
class NativeKernels(AnyPool):
    """`models.kernels.Kernels`, computed by the C++ beside it. A row's result is the same bits whatever shares its launch."""

    name: str
    compile_s: float
    """What compiling the library took at this start; 0 when it was found in the cache."""
    packed: bool = True
    placement: None = None
    """These compute on one device."""

    def linear(self, x: jax.Array, weight: Weight, outputs: int) -> jax.Array:
        """x float32[T, D] times a weight as panels, [panels, D, 16] -> float32[T, outputs]."""
        target, arrays = _stored("linear", x, weight, outputs, (), (LINEAR, LINEAR8, LINEAR4))
        return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype))(x, *arrays)

    def grouped_linear(self, x: jax.Array, weight: Weight, sizes: jax.Array, outputs: int) -> jax.Array:
        """x float32[S, D] in groups of `sizes` int32[X], weight as panels, [X, panels, D, 16] -> float32[S, outputs]."""
        targets = (GROUPED, GROUPED8, GROUPED4)
        target, arrays = _stored("grouped_linear", x, weight, outputs, sizes.shape, targets)
        call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype))
        return call(x, *arrays, sizes)

    def rms_norm(self, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
        """See `Kernels.rms_norm`. What has more axes, as heads' norms have, is XLA's."""
        if x.ndim != 2:
            return rowwise.rms_norm(x, scale, eps)
        _require_float32("rms_norm", x=x, scale=scale)
        call = jax.ffi.ffi_call(RMS_NORM, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return call(x, scale.reshape(-1), eps=np.float32(eps))

    def gated(self, both: jax.Array, activation: Activation) -> jax.Array:
        """See `Kernels.gated`. Activations that are none of `SIGMOIDS` are XLA's."""
        if activation not in SIGMOIDS:
            return rowwise.gated(both, activation)
        _require_float32("gated", both=both)
        call = jax.ffi.ffi_call(GATED, jax.ShapeDtypeStruct((both.shape[0], both.shape[2]), both.dtype))
        linear, cubic = SIGMOIDS[activation]
        return call(both, linear=np.float32(linear), cubic=np.float32(cubic))

    def argmax(self, x: jax.Array) -> jax.Array:
        """See `Kernels.argmax`."""
        _require_float32("argmax", x=x)
        return jax.ffi.ffi_call(ARGMAX, jax.ShapeDtypeStruct(x.shape[:1], jnp.int32))(x)

    def attend(
        self,
        qkv: jax.Array,
        kv: KvLayer,
        batch: PagedBatch,
        *,
        window: int | None,
        scale: float,
        one_token_rows: int,
        softcap: float | None = None,
        slopes: tuple[float, ...] = (),
        sinks: jax.Array | None = None,
        value_dim: int | None = None,
    ) -> tuple[jax.Array, KvLayer]:
        """Write the keys and values of qkv float32[T, K, G+2, H] into their pages in place, then attend its queries. The pages
        are of float32, or of int8 with scales; keys lie in columns, [K, P, W / 16, H, 16], where W is a multiple of 16. Where
        values are a part of the keys, XLA attends.

        `one_token_rows` is not needed: the kernel finds the runs of tokens itself.
        """
        if value_dim is not None:
            return XlaKernels("cpu").attend(
                qkv, kv, batch, window=window, scale=scale, one_token_rows=one_token_rows, softcap=softcap,
                slopes=slopes, sinks=sinks, value_dim=value_dim,
            )  # fmt: skip
        pools = tuple(pool for pool in kv if pool is not None)
        target = ATTEND if len(pools) == 2 else ATTEND8
        _require_float32(
            "attend", qkv=qkv, **dict(zip(("k_pool", "v_pool"), pools if target is ATTEND else ()))
        )
        if sinks is not None:
            _require_float32("attend", sinks=sinks)
        del one_token_rows
        tokens, kv_heads, members, head_dim = qkv.shape
        out = jax.ShapeDtypeStruct((tokens, kv_heads * (members - 2), head_dim), qkv.dtype)
        results = (out, *(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools))
        in_place = {number: number for number in range(1, 1 + len(pools))}
        call = jax.ffi.ffi_call(target, results, input_output_aliases=in_place)
        out, *pools = call(
            qkv,
            *pools,
            batch.positions,
            batch.rows,
            batch.table,
            *(() if sinks is None else (sinks,)),
            window=np.int64(window or 0),
            scale=np.float32(scale),
            softcap=np.float32(softcap or 0.0),
            slopes=np.array(slopes, np.float32),
        )
        return out, KvLayer(*pools)


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
    for target in TARGETS:
        symbol = target.partition(".")[0]
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    library.xlane_isa.restype = ctypes.c_char_p
    return NativeKernels(name=f"native ({library.xlane_isa().decode()})", compile_s=built.seconds)


def _require_float32(function: str, **arrays: jax.Array) -> None:
    for name, array in arrays.items():
        if array.dtype != jnp.float32:
            raise TypeError(f"{function}: the native kernels compute in float32, {name} is {array.dtype}")


def _stored(
    function: str,
    x: jax.Array,
    weight: Weight,
    outputs: int,
    groups: tuple[int, ...],
    targets: tuple[str, str, str],
) -> tuple[str, tuple[jax.Array, ...]]:
    """Which of the targets (for float32, int8 or FP8, int4) takes this weight, and the arrays it takes."""
    _require_float32(function, x=x)
    if not isinstance(weight, Quantized):
        _require_float32(function, weight=weight)
        arrays, target, inputs_each = (weight,), targets[0], 1
    elif weight.floors is None:
        arrays, target, inputs_each = (weight.values, weight.scales), targets[1], 1
    else:
        arrays, target, inputs_each = tuple(jax.tree.leaves(weight)), targets[2], 2
    shape = (*groups, -(-outputs // PANEL), x.shape[-1] // inputs_each, PANEL)
    if x.ndim != 2 or arrays[0].shape != shape:
        raise ValueError(
            f"{function}: x {x.shape} and weight {arrays[0].shape} do not give {outputs} outputs"
        )
    return target, arrays
