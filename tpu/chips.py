"""Chips we may not own: what each can do, and devices that only compile for it.

A topology is named as the clouds and people name it: `v6e-8`, `v5p-8`, `h200`, `h100-8`. The compilers are wheels that work
without the chip (libtpu; jax's CUDA plugin with NVIDIA's assembler). Private entry points of jax are met in this file
alone. Knows no model and no program.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from .runtime import set_tpu_defaults

_GB, _GIB, _TERA = 10**9, 2**30, 10**12


class TopologyError(Exception):
    """There is no such topology, or nothing here compiles for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One device as jax counts them, by its maker's data sheet."""

    name: str
    platform: str
    """`tpu` or `gpu`."""
    kinds: tuple[str, ...]
    """How jax's `device_kind` begins, whole words."""
    hbm_bytes: int
    hbm_bytes_per_s: float
    bf16_flops_per_s: float
    """Dense."""
    sizes: dict[int, str] = field(default_factory=dict)
    """TPU: number in the topology's name -> the grid of chips it stands for."""
    describes: str = ""
    """GPU: the fields of XLA's description that differ between GPUs."""


def _square(limit: int) -> dict[int, str]:
    """The grids of v5e and v6e."""
    grids = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
    return {count: grid for count, grid in grids.items() if count <= limit}


CHIPS = (
    Chip(
        name="v5e", platform="tpu", kinds=("TPU v5 lite", "TPU v5e"), hbm_bytes=16 * _GIB, hbm_bytes_per_s=819 * _GB,
        bf16_flops_per_s=197 * _TERA, sizes=_square(256),
    ),
    Chip(
        name="v6e", platform="tpu", kinds=("TPU v6 lite", "TPU v6e"), hbm_bytes=32 * _GIB, hbm_bytes_per_s=1640 * _GB,
        bf16_flops_per_s=918 * _TERA, sizes=_square(256),
    ),
    # Its names count cores, of which a chip has two and jax sees one.
    Chip(
        name="v5p", platform="tpu", kinds=("TPU v5p", "TPU v5"), hbm_bytes=95 * _GIB, hbm_bytes_per_s=2765 * _GB,
        bf16_flops_per_s=459 * _TERA, sizes={8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"},
    ),
    Chip(
        name="l4", platform="gpu", kinds=("NVIDIA L4",), hbm_bytes=24 * _GB, hbm_bytes_per_s=300 * _GB,
        bf16_flops_per_s=121 * _TERA,
        describes="core_count: 58 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376 "
        "threads_per_core_limit: 1536 l2_cache_size: 50331648 cuda_compute_capability { major: 8 minor: 9 }",
    ),
    Chip(
        name="a100", platform="gpu", kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"), hbm_bytes=80 * _GB, hbm_bytes_per_s=2039 * _GB,
        bf16_flops_per_s=312 * _TERA,
        describes="core_count: 108 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 "
        "threads_per_core_limit: 2048 l2_cache_size: 41943040 cuda_compute_capability { major: 8 }",
    ),
    Chip(
        name="h100", platform="gpu", kinds=("NVIDIA H100",), hbm_bytes=80 * _GB, hbm_bytes_per_s=3350 * _GB,
        bf16_flops_per_s=989 * _TERA,
        describes="core_count: 132 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 "
        "threads_per_core_limit: 2048 l2_cache_size: 52428800 cuda_compute_capability { major: 9 }",
    ),
    Chip(
        name="h200", platform="gpu", kinds=("NVIDIA H200",), hbm_bytes=141 * _GB, hbm_bytes_per_s=4800 * _GB,
        bf16_flops_per_s=989 * _TERA,
        describes="core_count: 132 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 "
        "threads_per_core_limit: 2048 l2_cache_size: 62914560 cuda_compute_capability { major: 9 }",
    ),
)  # fmt: skip

GPU_COUNTS = (1, 2, 4, 8)
"""Of one host."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Chips of one kind, wired together."""

    name: str
    chip: Chip
    count: int
    """Devices, as jax counts them."""
    number: int
    """What stands behind the dash."""


def find_topology(name: str) -> Topology:
    """`v6e-8`, `h200`, … -> which chips. Raises TopologyError with those there are."""
    word, dash, number = name.lower().partition("-")
    chip = next((chip for chip in CHIPS if chip.name == word), None)
    if chip is None:
        known = ", ".join(f"{chip.name}-{max(_numbers(chip))}" for chip in CHIPS)
        raise TopologyError(f"there is no topology {name}: known are {known} and smaller ones of each")
    numbers = _numbers(chip)
    if not dash:
        number = str(numbers[0])
    if not number.isdecimal() or int(number) not in numbers:
        raise TopologyError(
            f"there is no topology {name}: after {word}- comes one of {', '.join(map(str, numbers))}"
        )
    count = _chips(chip.sizes[int(number)]) if chip.sizes else int(number)
    return Topology(f"{word}-{number}", chip, count, int(number))


def chip_of(device: Any) -> Chip | None:
    """Which chip of the table this device of jax is; None for a CPU and for one that is not in the table."""
    kind = f"{device.device_kind} "
    return next((chip for chip in CHIPS if kind.startswith(tuple(f"{one} " for one in chip.kinds))), None)


def _numbers(chip: Chip) -> Sequence[int]:
    return tuple(chip.sizes) or GPU_COUNTS


def _chips(grid: str) -> int:
    count = 1
    for side in grid.split("x"):
        count *= int(side)
    return count


def compile_only_devices(topology: Topology) -> list[Any]:
    """Devices that programs can be lowered and compiled for, and that run nothing.

    Leaves this process with jax's CPU backend. Raises TopologyError that says what to install if the compiler is not there.
    """
    # Whatever accelerator is here is not ours to take, and an absent one not to be waited for.
    jax.config.update("jax_platforms", "cpu")
    describe = _tpu_devices if topology.chip.platform == "tpu" else _gpu_devices
    try:
        return list(describe(topology))
    except (RuntimeError, NotImplementedError, ImportError) as error:
        wheel = "libtpu" if topology.chip.platform == "tpu" else "jax-cuda13-plugin"
        raise TopologyError(
            f"nothing here compiles for {topology.name}: install {wheel} as jax {jax.__version__} wants it ({error})"
        ) from error


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    # Else libtpu asks the cloud's metadata server, which answers nowhere but on a TPU host.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    set_tpu_defaults(os.environ)
    grid = topology.chip.sizes[topology.number]
    # Up to eight chips of v5e and v6e are one host's.
    sides = tuple(map(int, grid.split("x")))
    bounds = {"chips_per_host_bounds": (*sides, 1)} if len(sides) == 2 and topology.count <= 8 else {}
    name = f"{topology.chip.name}:{grid}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices


_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  fpus_per_core: 128 clock_rate_ghz: 1.7 memory_bandwidth: {bandwidth} device_memory_size: {memory} {describes}
}}
platform_name: "CUDA" device_description_str: "{kind}"
runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 12 }}
"""
"""XLA's description of a GPU (`GpuTargetConfigProto`). Without the GPU there is no autotuning: its products are not cuBLAS's."""


def _gpu_devices(topology: Topology) -> Sequence[Any]:
    chip = topology.chip
    target = _GPU.format(
        bandwidth=chip.hbm_bytes_per_s, memory=chip.hbm_bytes, describes=chip.describes, kind=chip.kinds[0]
    )
    grid = f"1x1x{topology.count}"
    return topologies.get_topology_desc(chip.name, "cuda", target_config=target, topology=grid).devices
