"""How far the native CPU kernels are from what the machine allows, and from XLA's own: python tests/engine/bench_native.py.

Not a test: pytest does not collect it. All matmuls of one step of a 135M-parameter decoder, attention over paged keys,
and beside them the ceilings they are measured against. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from xlane.engine.kernels.native.calls import NativeKernels, native_kernels
from xlane.models.kernels import KvLayer, PagedBatch
from xlane.models.spec import Quantized, pack

LAYER = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
"""(outputs, inputs) of one layer's matmuls."""
HEAD = (49152, 576)
LAYERS = 30
KV_HEADS, GROUP, HEAD_SIZE, PAGE = 3, 3, 64, 16


def best_ms(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The fastest of many runs of each, taken in turns: other work on the machine then hurts all of them alike."""
    for call in calls.values():
        jax.block_until_ready(call())
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def ceilings(seconds: float) -> tuple[float, float]:
    """GB/s of reading, by an XLA sum over more than any cache holds; GFLOP/s of a large XLA matmul."""
    big = jnp.ones(1 << 26)
    a = jnp.ones((2048, 2048))
    total, product = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    best = best_ms({"read": lambda: total(big), "fma": lambda: product(a, a)}, seconds)
    return big.nbytes / best["read"] / 1e6, 2 * 2048**3 / best["fma"] / 1e6


def stored(weight: np.ndarray, kind: str) -> jax.Array | Quantized[jax.Array]:
    """Panels of a weight [N, D]; for the time that it takes, its values do not matter."""
    bits, _, group = kind.partition("/")
    if bits == "float32":
        return jnp.asarray(pack(weight))
    values = (weight * 1000).astype(np.int8 if bits == "int8" else ml_dtypes.float8_e4m3fn)
    scales = np.full((len(weight), weight.shape[1] // int(group) if group else 1), 1e-3, np.float32)
    return Quantized(jnp.asarray(pack(values)), jnp.asarray(pack(scales)))


def matmuls(
    kernels: NativeKernels, tokens: list[int], seconds: float, with_xla: bool, kind: str
) -> list[dict[str, float]]:
    """ms of every matmul of a step, chained so that none can be skipped; each layer has its own weights of this kind."""
    rng = np.random.default_rng(0)
    shapes = LAYER * LAYERS + [HEAD]
    plain = [rng.standard_normal(shape, dtype=np.float32) * 0.02 for shape in shapes]
    packed = [stored(weight, kind) for weight in plain]
    weights = [jnp.asarray(weight) for weight in plain] if with_xla else []
    size, products = (
        sum(array.nbytes for array in jax.tree.leaves(packed)),
        sum(weight.size for weight in plain),
    )

    def step(linear: Callable[[jax.Array, jax.Array, int], jax.Array]) -> Callable[..., jax.Array]:
        def run(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
            for (outputs, inputs), weight in zip(shapes, weights, strict=True):
                x = linear(x[:, :inputs], weight, outputs)
            return x

        return jax.jit(run)

    native = step(kernels.linear)
    xwt, wxt = step(lambda x, w, _: x @ w.T), step(lambda x, w, _: (w @ x.T).T)
    rows: list[dict[str, float]] = []
    for count in tokens:
        x = jnp.asarray(rng.standard_normal((count, 576), dtype=np.float32))
        x = jnp.concatenate([x, x, x], axis=1)
        calls: dict[str, Callable[[], object]] = {"native": lambda x=x: native(x, packed)}
        if with_xla:
            calls |= {"x@W.T": lambda x=x: xwt(x, weights), "W@x.T": lambda x=x: wxt(x, weights)}
        best = best_ms(calls, seconds)
        best |= {"GB/s": size / best["native"] / 1e6, "GFLOP/s": 2 * count * products / best["native"] / 1e6}
        rows.append({"tokens": count} | {name: round(value, 2) for name, value in best.items()})
        print(rows[-1], flush=True)
    return rows


def attention(kernels: NativeKernels, seconds: float) -> list[dict[str, float]]:
    """ms of one layer: 16 sequences decoding, one sequence decoding, and a prompt of 512 with as much before it."""
    rng = np.random.default_rng(0)
    found: list[dict[str, float]] = []
    for rows, new, held in [
        (1, 1, 255),
        (16, 1, 255),
        (16, 1, 2047),
        (1, 1, 8191),
        (1, 512, 0),
        (1, 512, 512),
    ]:
        width = -(-(held + new) // PAGE)
        table = rng.permutation(rows * width).reshape(rows, width).astype(np.int32)
        kv = KvLayer(*(jnp.zeros((KV_HEADS, rows * width, PAGE, HEAD_SIZE)) for _ in range(2)))
        positions = jnp.tile(jnp.arange(held, held + new, dtype=jnp.int32), rows)
        batch = PagedBatch(positions, jnp.repeat(jnp.arange(rows, dtype=jnp.int32), new), jnp.asarray(table))
        shape = (rows * new, KV_HEADS, GROUP + 2, HEAD_SIZE)
        qkv = jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

        def call(qkv: jax.Array, kv: KvLayer, batch: PagedBatch) -> tuple[jax.Array, KvLayer]:
            return kernels.attend(qkv, kv, batch, window=None, scale=0.125, one_token_rows=0)

        step = jax.jit(call, donate_argnums=1)
        best = float("inf")
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            _, kv = jax.block_until_ready(step(qkv, kv, batch))
            best = min(best, (time.perf_counter() - start) * 1e3)
        keys = rows * new * held + rows * new * (new + 1) // 2
        flops = keys * KV_HEADS * GROUP * HEAD_SIZE * 4
        size = 2 * kv.k.nbytes
        found.append({"rows": rows, "new": new, "held": held, "ms": round(best, 3)})
        found[-1] |= {"GB/s": round(size / best / 1e6, 1), "GFLOP/s": round(flops / best / 1e6, 1)}
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 8, 16, 32, 128, 512])
    parser.add_argument(
        "--weights",
        default="float32",
        help="float32, int8 or fp8, /N of the latter two with a scale for N inputs",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--no-xla", action="store_true", help="the native kernels only")
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "xlane-bench-native")
    options = parser.parse_args()
    kernels = native_kernels(options.cache_dir)
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    read, fma = ceilings(options.seconds)
    print(f"{kernels.name}; reading {read:.1f} GB/s, large matmul {fma:.0f} GFLOP/s (both XLA's)", flush=True)
    result = {
        "kernels": kernels.name,
        "read_gb_s": round(read, 1),
        "matmul_gflop_s": round(fma, 1),
        "matmuls": matmuls(kernels, options.tokens, options.seconds, not options.no_xla, options.weights),
        "attention": attention(kernels, options.seconds),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
