"""Attention of prompts alone, on this device: our paged kernel beside cuDNN's, which knows no pages, and plain XLA.

    python -m tests.bench.prompt_attention [--tokens 512,2048,8192,2048+6144,2x1024] [--heads 32] [--kv-heads 8] [--head-dim 128]
        [--page-tokens 32] [--ways pallas,cudnn,xla]

2048+6144 is a piece of 2,048 tokens behind 6,144 that are held, as of a prompt read in pieces; 2x1024 two prompts in one launch.
cuDNN, which is left out there, is given keys and values that already lie behind each other: what it takes to gather them
from pages, or to write them into pages, is not counted for it and is for the others. Prints a line a figure, and one JSON
line last.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlane.engine.bench import measure_ceilings
from xlane.engine.kernels.pallas_gpu import PallasGpuKernels
from xlane.models.attention import XlaKernels, default_scale
from xlane.models.kernels import Kernels, KvLayer, PagedBatch

INNER = 8
"""Times that one launch attends, each with what the one before it gave: a launch from the host takes as long as a short one."""


class Case(NamedTuple):
    """Prompts side by side, each with as many tokens in the launch and held before it."""

    prompts: int
    tokens: int
    history: int

    @classmethod
    def said(cls, text: str) -> "Case":
        prompts, _, own = text.rpartition("x")
        tokens, _, history = own.partition("+")
        return cls(int(prompts or 1), int(tokens), int(history or 0))


def main() -> None:
    args = _arguments()
    ceilings = measure_ceilings(jax.devices()[0].platform, "bfloat16")
    figures: list[dict[str, Any]] = []
    for text in args.tokens.split(","):
        case = Case.said(text)
        qkv = _random(args, case.prompts * case.tokens)
        # Two products; of its own tokens a query sees half.
        seen = case.prompts * case.tokens * (case.history + case.tokens / 2)
        flops = 4 * seen * args.heads * args.head_dim
        for way, attend in _ways(args, case).items():
            seconds = _seconds(attend, qkv)
            rate = flops / seconds / 1e9
            share = rate / ceilings.matmul_gflop_per_s
            print(
                f"{way:7} {text:>9} tokens {seconds * 1e3:8.3f} ms, {rate / 1e3:.0f} TFLOP/s ({share:.0%})",
                flush=True,
            )
            figures.append({"way": way, "tokens": text, "ms": seconds * 1e3})
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "figures": figures}))


def _random(args: argparse.Namespace, tokens: int) -> jax.Array:
    members = args.heads // args.kv_heads + 2
    return jax.random.normal(jax.random.key(0), (tokens, args.kv_heads, members, args.head_dim), jnp.bfloat16)


def _ways(args: argparse.Namespace, case: Case) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Those asked for that know such a case. Each takes qkv [T, K, G+2, H] and gives [T, N, H]."""
    ways: dict[str, Callable[[jax.Array], jax.Array]] = {
        "pallas": partial(_paged, PallasGpuKernels(), args, case),
        "xla": partial(_paged, XlaKernels("gpu"), args, case),
    }
    if case.prompts == 1 and not case.history:
        ways["cudnn"] = _cudnn
    return {way: ways[way] for way in args.ways.split(",") if way in ways}


def _paged(kernels: Kernels, args: argparse.Namespace, case: Case, qkv: jax.Array) -> jax.Array:
    pages = -(-(case.history + case.tokens) // args.page_tokens)
    pool = jnp.zeros((args.kv_heads, case.prompts * pages, args.page_tokens, args.head_dim), qkv.dtype)
    row, token = jnp.divmod(jnp.arange(qkv.shape[0], dtype=jnp.int32), case.tokens)
    table = jnp.arange(case.prompts * pages, dtype=jnp.int32).reshape(case.prompts, pages)
    batch = PagedBatch(case.history + token, row, table)
    scale = default_scale(args.head_dim)
    out, _ = kernels.attend(qkv, KvLayer(pool, pool), batch, window=None, scale=scale, one_token_rows=0)
    return out


def _cudnn(qkv: jax.Array) -> jax.Array:
    tokens, kv_heads, members, head_dim = qkv.shape
    query = qkv[:, :, :-2].reshape(1, tokens, kv_heads * (members - 2), head_dim)
    out = jax.nn.dot_product_attention(
        query, qkv[None, :, :, -2], qkv[None, :, :, -1], is_causal=True, implementation="cudnn"
    )
    return out[0]


def _seconds(attend: Callable[[jax.Array], jax.Array], qkv: jax.Array) -> float:
    """Of one attention, the best of three launches of INNER."""

    @jax.jit
    def launch(qkv: jax.Array) -> jax.Array:
        group = qkv.shape[2] - 2

        def again(_: int, qkv: jax.Array) -> jax.Array:
            out = attend(qkv).reshape(*qkv.shape[:2], group, qkv.shape[3])
            return qkv.at[:, :, :group].set(out)

        return jax.lax.fori_loop(0, INNER, again, qkv)

    launch(qkv).block_until_ready()
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        launch(qkv).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return best / INNER


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="512,2048,8192,2048+6144,2x1024")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-tokens", type=int, default=32)
    parser.add_argument("--ways", default="pallas,cudnn,xla")
    return parser.parse_args()


if __name__ == "__main__":
    main()
