"""How the device's memory is shared out: weights, KV pages, lane state, the programs' own temporaries. Arithmetic only.

The number of pages is what really is left, so that running out of memory while serving cannot happen: pressure queues or
preempts instead. On CPU the pool is a modest share of the machine's memory, the same at each start, because programs
are compiled (and cached) for it. Knows no programs.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from ..models.config import ModelConfig
from .config import EngineConfig
from .errors import PlanError
from .pages import pages_for

CPU_POOL_SHARE = 1 / 12
"""Of the machine's memory, for the KV pool, unless `kv_bytes` says otherwise."""

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What goes where, in bytes over all devices together; what several devices hold counts for each."""

    limit_bytes: int
    """What the engine may use."""
    weights_bytes: int
    kv_bytes: int
    state_bytes: int
    temp_bytes: int
    """The largest program's temporaries: an estimate before compiling, the compiler's own figure after."""
    pages: int
    page_tokens: int
    lanes: int
    max_total_tokens: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.state_bytes + self.temp_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens the pool holds."""
        return self.pages * self.page_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Bytes a model and its lanes need, over all devices together."""

    weights_bytes: int
    page_bytes: int
    page_tokens: int
    """What a page holds."""
    state_bytes: int
    temp_bytes: int


def machine_bytes() -> int:
    """Memory of this machine, or of its control group if that allows less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        text = path.read_text().strip() if path.exists() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total


def estimate_temp_bytes(config: ModelConfig, launch_tokens: int, result_rows: int, itemsize: int) -> int:
    """What the largest program needs beside its arguments: activations of a chunk, and a few copies of its logits."""
    ffn = config.ffn_size
    if config.experts:
        # Each of a token's experts has a row of its own, in and out.
        one = config.experts.ffn_size + config.hidden_size
        ffn = max(ffn, config.experts.chosen * one + config.experts.shared_ffn_size)
    per_token = 4 * config.hidden_size + 3 * ffn + 6 * config.heads * config.head_dim
    return launch_tokens * per_token * max(itemsize, 4) + 8 * result_rows * config.vocab_size * 4


def plan_pages(
    config: EngineConfig, demand: Demand, limit_bytes: int, on_cpu: bool, lanes: int, most: int
) -> MemoryPlan:
    """Decide the number of pages. `most` is the longest request in tokens.

    Raises PlanError if not even one longest request fits, saying what to lower.
    """
    one_request = pages_for(most, demand.page_tokens)
    useful = lanes * one_request
    left = limit_bytes - demand.weights_bytes - demand.state_bytes - demand.temp_bytes
    if config.kv_bytes is not None:
        wanted = config.kv_bytes
    elif on_cpu:
        wanted = max(int(limit_bytes * CPU_POOL_SHARE), one_request * demand.page_bytes)
    else:
        wanted = left
    pages = min(useful, min(wanted, left) // demand.page_bytes)
    if pages < one_request:
        raise PlanError(
            f"one request of max_total_tokens={most} needs {one_request * demand.page_bytes / GIB:.2f} GiB of KV cache, but "
            f"{max(0, min(wanted, left)) / GIB:.2f} GiB are there for it (memory {limit_bytes / GIB:.2f} GiB, weights "
            f"{demand.weights_bytes / GIB:.2f} GiB): lower --max-total-tokens, or choose a smaller model"
        )
    return MemoryPlan(
        limit_bytes=limit_bytes,
        weights_bytes=demand.weights_bytes,
        kv_bytes=pages * demand.page_bytes,
        state_bytes=demand.state_bytes,
        temp_bytes=demand.temp_bytes,
        pages=pages,
        page_tokens=demand.page_tokens,
        lanes=lanes,
        max_total_tokens=most,
    )
