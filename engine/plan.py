"""What a model needs and would do on a device or a topology, without loading it: `xlane plan`.

Knows files, sizes and bounds; starts no engine. With `compiled` the compiler has its say, too, for chips that are not here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..models.config import ModelConfig
from ..models.spec import parameters
from ..tpu.chips import Topology, TopologyError, chip_of, compile_only_devices, find_topology
from .audit import faults
from .bench import measure_ceilings
from .buckets import covering
from .build import compile_within, design
from .config import EngineConfig
from .errors import PlanError
from .memory import MemoryPlan
from .opening import open_served
from .roofline import Roofline
from .state import page_bytes
from .step import Blueprint

CONTEXT_TOKENS = 1024
"""What each lane holds in the step that is predicted."""


def describe(
    config: EngineConfig,
    path: Path,
    topology_name: str | None = None,
    compiled: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """What the model at `path` needs and would get on this device, or on a topology that is named.

    Names say the unit. `progress(done, total)` counts programs. `compiled` compiles the largest programs, takes the compiler's figures for the estimates, and
    refuses if it did something else than was meant. Raises PlanError, ModelError.
    """
    model = open_served(config, path, weights=False).config
    try:
        topology = None if topology_name is None else find_topology(topology_name)
        devices = compile_only_devices(topology) if topology is not None and compiled else ()
    except TopologyError as error:
        raise PlanError(str(error)) from error
    blueprint, memory, kernels = design(config, model, topology=topology, devices=devices)
    names = ", ".join(size.name for size in blueprint.sizes)
    programs = f"{len(blueprint.sizes)}, not compiled (--compile): {names}"
    if compiled:
        memory, programs = _compiled(config, blueprint, memory, progress)
    return (
        _of_model(config, model, blueprint, memory)
        | _of_device(blueprint, memory, topology)
        | {"kernels": kernels, "programs": programs}
        | _of_time(blueprint, memory, topology)
    )


def _compiled(
    config: EngineConfig, blueprint: Blueprint, memory: MemoryPlan, progress: Callable[[int, int], None]
) -> tuple[MemoryPlan, str]:
    programs, memory = compile_within(
        config, largest(blueprint), memory, lambda phase, done, total: progress(done, total)
    )
    if wrong := faults(programs):
        raise PlanError("the compiler did not do what was meant: " + "; ".join(wrong))
    names = ", ".join(info.name for info in programs.infos)
    return memory, f"{names} compiled and checked"


def largest(blueprint: Blueprint) -> Blueprint:
    """The same with the largest launch of each kind alone (lanes, prompts, both): no other needs as much memory."""
    return replace(blueprint, sizes=covering(blueprint.sizes))


def _of_model(
    config: EngineConfig, model: ModelConfig, blueprint: Blueprint, memory: MemoryPlan
) -> dict[str, Any]:
    return {
        "model": config.model_id,
        "family": model.family,
        "parameters": parameters(blueprint.graph.specs),
        "layers": model.layers,
        "KV heads": model.kv_heads,
        "copies of each KV head": blueprint.config.kv_copies,
        "context tokens": model.max_positions,
        "dtype": blueprint.dtype,
        "quantize": blueprint.quantize or "none",
        "weights bytes": memory.weights_bytes,
        "KV cache bytes per token": page_bytes(
            blueprint.config, 1, blueprint.kv_dtype, blueprint.shapes.kv_rows
        ),
    }


def _of_device(blueprint: Blueprint, memory: MemoryPlan, topology: Topology | None) -> dict[str, Any]:
    if topology is not None:
        device = topology.name
    else:
        here = blueprint.placement.device
        device = f"{here.device_kind} ({here.platform})"
    return {
        "device": device,
        "devices": blueprint.placement.mesh.size,
        "memory bytes": memory.limit_bytes,
        "temporaries bytes": memory.temp_bytes,
        "KV cache bytes": memory.kv_bytes,
        "KV cache tokens": memory.kv_tokens,
        "KV page tokens": memory.page_tokens,
        "lanes": memory.lanes,
        "max total tokens": memory.max_total_tokens,
    }


def _of_time(blueprint: Blueprint, memory: MemoryPlan, topology: Topology | None) -> dict[str, Any]:
    """The shortest times that bytes and operations allow, by the data sheet, or by what is measured where there is none."""
    place = blueprint.placement
    chip = topology.chip if topology is not None else chip_of(place.device)
    if chip is not None:
        read, flops = chip.hbm_bytes_per_s, chip.bf16_flops_per_s
    else:
        ceilings = measure_ceilings(place.device.platform, blueprint.dtype)
        read, flops = ceilings.read_gb_per_s * 1e9, ceilings.matmul_gflop_per_s * 1e9
    roofline = Roofline(
        config=blueprint.config,
        specs=blueprint.graph.specs,
        kv_dtype=blueprint.kv_dtype,
        kv_rows=blueprint.shapes.kv_rows,
        split=place.model_size,
        copies=place.data_size,
        read_bytes_per_s=read,
        flops_per_s=flops,
    )
    context = min(CONTEXT_TOKENS, memory.max_total_tokens, memory.kv_tokens // memory.lanes)
    chunk = blueprint.chunk_tokens
    return {
        "memory GB/s of a device": round(read / 1e9, 1),
        "bfloat16 TFLOP/s of a device" if chip else "TFLOP/s of a device": round(flops / 1e12, 3),
        "held tokens a lane": context,
        "step ms of 1 lane at least": round(roofline.decode_s(1, context) * 1e3, 3),
        "step ms of all lanes at least": round(roofline.decode_s(memory.lanes, context) * 1e3, 3),
        "prompt tokens per s at most": round(chunk / roofline.prefill_s(chunk)),
    }
