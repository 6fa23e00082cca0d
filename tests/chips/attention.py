"""Run as a process of its own: compile attention alone for a TPU, with as large a page table as there may be, and print what came out.

python -m tests.chips.attention TOPOLOGY
"""

import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from tests.chips.facts import scale_moves
from xlane.engine.hlo import moves
from xlane.engine.kernels.pallas_tpu import MOST_TABLE_BYTES, PallasTpuKernels
from xlane.models.kernels import KvLayer, PagedBatch
from xlane.tpu.chips import compile_only_devices, find_topology

LANES, SEGMENTS, CHUNK_TOKENS, PAGES = 64, 8, 256, 1024
CASES = {
    # kv heads, query heads of each, head size, tokens of a page, type of keys and values, form
    "small pages": (8, 4, 128, 16, "bfloat16", {}),
    "pages of several blocks": (8, 4, 128, 1024, "bfloat16", {"window": 4096, "softcap": 30.0}),
    "int8": (8, 4, 128, 128, "int8", {}),
    "int8, heads of 64": (8, 4, 64, 128, "int8", {"window": 128}),
    "int8, heads of 256": (1, 8, 256, 256, "int8", {"softcap": 50.0}),
    "int8, one head of each, pages of several blocks": (8, 1, 128, 512, "int8", {}),
}


def compiled(
    device: Any, kv_heads: int, group: int, head_dim: int, page: int, kv_dtype: str, form: Any
) -> dict:
    """Lanes that decode beside prompts."""
    kernels = PallasTpuKernels()
    where = jax.sharding.SingleDeviceSharding(device)
    rows, tokens = LANES + SEGMENTS, LANES + CHUNK_TOKENS

    def array(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    count, width = kernels.kv_rows(kv_heads, head_dim)
    pool, scales = array(kv_dtype, count, PAGES, page, width), array("float32", count, PAGES, page)
    kv = KvLayer(pool, pool, scales, scales) if kv_dtype == "int8" else KvLayer(pool, pool)
    table = array("int32", rows, MOST_TABLE_BYTES // 4 // rows)

    def attend(qkv: jax.Array, kv: KvLayer, batch: PagedBatch) -> tuple[jax.Array, KvLayer]:
        return kernels.attend(qkv, kv, batch, scale=0.1, one_token_rows=LANES, **{"window": None, **form})

    program = (
        jax.jit(attend, donate_argnums=1)
        .lower(
            array("bfloat16", tokens, kv_heads, group + 2, head_dim),
            kv,
            PagedBatch(array("int32", tokens), array("int32", tokens), table),
        )
        .compile()
    )
    text, memory = program.as_text(), program.memory_analysis()
    held = [leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(kv)]
    return {
        "refusal": kernels.refusal(page, table.shape, kv_dtype),
        "kernels": [name for name in ("decode", "prefill") if f"xlane_{name}_attention" in text],
        "moves": moves(text, math.prod(pool.shape)) + scale_moves(text, scales.shape),
        "in place": memory.alias_size_in_bytes >= sum(held),
    }


if __name__ == "__main__":
    chip = compile_only_devices(find_topology(sys.argv[1]))[0]
    print(json.dumps({name: compiled(chip, *case) for name, case in CASES.items()}))
