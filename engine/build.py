"""From a configuration and an opened model to what the engine runs on: sizes decided, weights placed, programs compiled.

Loading and compiling go on at the same time. Each decision that a person should know of is in `Built`. Knows no requests.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..models.attention import XlaKernels
from ..models.config import ModelConfig
from ..models.decoder import DecoderGraph
from ..models.demo import default_cache_dir
from ..models.kernels import Kernels
from ..models.loader import dummy_params, load_params
from ..models.lora_weights import AdaptedWeights, AdapterArrays
from ..models.repeated import RepeatedHeads, for_devices
from ..models.spec import Quant
from ..models.weights import WeightSource
from ..sharding.mesh import MeshError, Placement, imagined_placement, make_placement
from ..sharding.processes import least_of_all
from ..tpu.chips import Topology
from .buckets import DEFAULTS, SEGMENTS, launch_sizes, most_decode_rows
from .config import EngineConfig, texts_folder
from .errors import PlanError
from .heads import heads_shape, load_heads
from .kernels.native.calls import native_kernels
from .kernels.pallas_tpu_rows import LANE as TPU_LANE
from .manifest import read_manifest
from .memory import Demand, MemoryPlan, estimate_temp_bytes, machine_bytes, plan_pages
from .pages import pages_for
from .programs import Programs, abstract_weights, compile_all, param_sharding
from .prompt_scores import block_rows
from .state import Shapes, abstract_kv, abstract_state, held_bytes
from .step import Blueprint, Params
from .watermark import Watermark

Progress = Callable[[str, int, int], None]
"""Called with a phase (`weights`: bytes, `kernels` and `programs`: count), what is done and what there is in all."""


def _unseen(phase: str, done: int, total: int) -> None:
    """Nobody looks."""


@dataclass(frozen=True, slots=True)
class Built:
    """All that `Runner` and `Scheduler` need, and what was decided on the way."""

    programs: Programs
    params: Params
    memory: MemoryPlan
    kernels_note: str
    warning: str
    """Of options that cost speed; empty if none does."""
    chunk_tokens: int
    max_input_tokens: int
    adapter_arrays: AdapterArrays | None
    """Makes what the slots of adapters hold; None where none can be loaded."""


def build(
    config: EngineConfig,
    model: ModelConfig,
    source: WeightSource | None,
    progress: Progress | None = None,
    agree: Callable[[Blueprint], None] = lambda blueprint: None,
) -> Built:
    """Decide, load and compile. `source` None fills the weights with random numbers (`load_format: dummy`). `agree` is
    shown what was decided before anything large is begun, and may raise.

    Raises PlanError if model, configuration and device do not fit; ModelError for a bad checkpoint.
    """
    report = progress or _unseen
    blueprint, memory, note = design(config, model, report)
    agree(blueprint)
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
        loading = pool.submit(load_weights, config, blueprint, source, report)
        programs, memory = compile_within(config, blueprint, memory, report, serves=True)
        try:
            params = loading.result()
        except BaseException:
            programs.close()
            raise
    return Built(
        programs=programs,
        params=params,
        memory=memory,
        kernels_note=note,
        warning=slower(blueprint),
        chunk_tokens=blueprint.chunk_tokens,
        max_input_tokens=min(
            config.max_input_tokens or memory.max_total_tokens - 1, memory.max_total_tokens - 1
        ),
        adapter_arrays=source.arrays
        if isinstance(source, AdaptedWeights) and config.processes == 1
        else None,
    )


def compile_within(
    config: EngineConfig, blueprint: Blueprint, memory: MemoryPlan, report: Progress, *, serves: bool = False
) -> tuple[Programs, MemoryPlan]:
    """Compile, and hold the plan against what the compiler says the programs need: where its temporaries are larger than
    was estimated, the pool gives way and the programs are compiled for the smaller one. `serves`: some may come later."""

    def compiled(blueprint: Blueprint) -> Programs:
        # Several processes must come to one program: each traces it. On accelerators, at hand or planned for, this was not
        # tried yet.
        keeps = config.processes == 1 and blueprint.placement.device.platform == "cpu"
        texts = texts_folder(config) if keeps else None
        early = serves and config.processes == 1
        known = read_manifest(config, blueprint, jax.__version__) if early else ()
        return compile_all(blueprint, lambda done, total: report("programs", done, total), texts, known)

    programs = compiled(blueprint)
    temp_bytes = max(info.temp_bytes for info in programs.infos) * blueprint.placement.mesh.size
    memory = replace(memory, temp_bytes=temp_bytes)
    if memory.total_bytes <= memory.limit_bytes:
        return programs, memory
    demand = Demand(
        weights_bytes=memory.weights_bytes,
        page_bytes=memory.kv_bytes // memory.pages,
        page_tokens=memory.page_tokens,
        state_bytes=memory.state_bytes,
        temp_bytes=memory.temp_bytes,
    )
    memory = plan_pages(config, demand, memory.limit_bytes, False, memory.lanes, memory.max_total_tokens)
    programs.close()
    smaller = replace(blueprint, shapes=blueprint.shapes._replace(pages=memory.pages))
    return compiled(smaller), memory


def design(
    config: EngineConfig,
    model: ModelConfig,
    report: Progress = _unseen,
    topology: Topology | None = None,
    devices: Sequence[Any] = (),
) -> tuple[Blueprint, MemoryPlan, str]:
    """Decide every size, allocating nothing -> (what to compile, who gets which memory, which kernels and why).

    For the devices at hand, or for a `topology`: with its compile-only `devices` the programs can be compiled, without
    them everything is known but what the compiler says.
    """
    placement = _placement(config, model, topology, devices)
    platform = placement.device.platform if topology is None else topology.chip.platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    dtype = config.dtype or ("float32" if platform == "cpu" else "bfloat16")
    kernels, note = _kernels(config, platform, placement, dtype, report)
    most = _most_tokens(config, model)
    model = for_devices(model, placement.model_size)
    if model.lora and model.kv_copies > 1:
        raise PlanError(
            f"--lora-adapters are not read where kv heads have copies, as the {model.kv_heads // model.kv_copies} of this model "
            f"have over {model.kv_heads} devices: lower --num-shard"
        )
    # Some rotary scalings follow from the context that is served, whatever the model was made for.
    model = replace(model, max_positions=most)
    quant = _asked_bits(config, model)
    graph = DecoderGraph.of(model, dtype, packed=kernels.packed, quant=quant)
    defaults = DEFAULTS[platform]
    lanes = config.lanes or defaults.lanes
    if lanes % placement.data_size:
        raise PlanError(
            f"{lanes} lanes cannot be split over data_parallel={placement.data_size}: choose a multiple"
        )
    chunk = min(config.prefill_chunk_tokens or defaults.chunk_tokens, -(-most // 16) * 16)
    segments = min(SEGMENTS, lanes)
    rows = most_decode_rows(lanes, config.speculate, defaults.cheap_rows)
    rows -= rows % placement.data_size  # lanes divide, so there are still enough
    kv_dtype = config.kv_dtype or dtype
    itemsize = jnp.dtype(dtype).itemsize
    page_tokens = config.page_tokens or kernels.page_tokens(most, max(rows, lanes + segments))
    one_page = Shapes(
        lanes=lanes,
        pages=1,
        page_tokens=page_tokens,
        table_width=pages_for(most, page_tokens),
        vocab=model.vocab_size,
        kv_rows=None if model.latent else kernels.kv_rows(model.kv_heads, model.head_dim),
    )
    sizes = launch_sizes(lanes, placement.data_size, chunk, defaults.least_tokens, defaults.few_tokens, rows)
    temp_bytes = estimate_temp_bytes(
        model, max(map(sum, sizes)), max(block_rows(lanes), rows, lanes + segments), itemsize
    )
    blueprint = Blueprint(
        config=model,
        graph=graph,
        kernels=kernels,
        placement=placement,
        shapes=one_page,
        dtype=dtype,
        quantize=quant or next((spec.quant for spec in graph.specs if spec.as_stored), None),
        kv_dtype=kv_dtype,
        sizes=sizes,
        prefill_segments=segments,
        watermark=_watermark(config),
        heads=heads_shape(config, model),
    )
    demand = Demand(
        weights_bytes=held_bytes(abstract_weights(blueprint)),
        page_bytes=held_bytes(abstract_kv(model, one_page, kv_dtype, placement)),
        page_tokens=page_tokens,
        state_bytes=held_bytes(abstract_state(one_page, placement, adapters=model.lora is not None)),
        temp_bytes=temp_bytes * placement.mesh.size,
    )
    limit = _limit(config, placement, platform, topology)
    memory = plan_pages(config, demand, limit, platform == "cpu", lanes, most)
    blueprint = replace(blueprint, shapes=one_page._replace(pages=memory.pages))
    return blueprint, memory, note + _refused(config, blueprint)


def _asked_bits(config: EngineConfig, model: ModelConfig) -> Quant | None:
    """What weights are made to be; None leaves them as the checkpoint has them."""
    asked = config.quantize
    if asked is None or asked == "int8" or asked == "int4":
        return asked
    if asked != model.stored_by:
        found = f"quantised by {model.stored_by}" if model.stored_by else "not quantised"
        raise PlanError(
            f"--quantize {asked}: this checkpoint is {found}; leave the option out, which keeps weights as they are stored, or "
            "make them smaller with int8 or int4"
        )
    return None


def _placement(
    config: EngineConfig, model: ModelConfig, topology: Topology | None, devices: Sequence[Any]
) -> Placement:
    on_cpu = several = False
    try:
        if topology is None:
            on_cpu, several = jax.devices()[0].platform == "cpu", jax.process_count() > 1
            # On CPU a second device of a process is a simulation: only on request.
            width = config.model_parallel or (1 if on_cpu and not several else None)
            placement = make_placement(config.data_parallel, width)
        elif devices:
            placement = make_placement(config.data_parallel, config.model_parallel, devices)
        else:
            placement = imagined_placement(config.data_parallel, config.model_parallel, topology.count)
    except MeshError as error:
        raise PlanError(str(error)) from None
    if on_cpu and several and placement.data_size > 1 and placement.model_size > 1:
        # Two kinds of groups at once: gloo's collectives may wait for each other for ever.
        raise PlanError(
            "processes on CPUs can be split along one axis: give --data-parallel 1, or --num-shard 1"
        )
    split = placement.model_size
    # A vocabulary that does not divide is whole on every device; of these a whole copy would be the model itself.
    parts = {"heads": model.heads} if model.latent else {"kv_heads": for_devices(model, split).kv_heads}
    parts["ffn_size"] = model.ffn_size
    if model.experts:
        parts |= {"experts": model.experts.count, "shared_ffn_size": model.experts.shared_ffn_size}
    for name, size in parts.items():
        if size % split:
            raise PlanError(
                f"{name}={size} of this model cannot be split over {split} devices: lower --num-shard"
            )
    return placement


def _kernels(
    config: EngineConfig, platform: str, placement: Placement, dtype: str, report: Progress
) -> tuple[Kernels, str]:
    """Choose who computes; the note says which and why."""
    several = None if placement.single else placement
    plain = XlaKernels(platform, several)
    if config.kernels == "xla":
        return plain, "xla (asked for)"
    # Pallas is slow to import, and is here only where it is used.
    if platform == "gpu" and config.kernels in ("auto", "pallas"):
        from .kernels.pallas_gpu import PallasGpuKernels

        ours = "attention" if several else "attention, few rows times int8"
        return PallasGpuKernels(several), f"pallas ({ours}; XLA's products)"
    if platform == "tpu" and config.kernels in ("auto", "pallas"):
        from .kernels.pallas_tpu import PallasTpuKernels

        return PallasTpuKernels(several), "pallas (attention; XLA's products)"
    if config.kernels == "pallas":
        raise PlanError(f"--kernels pallas serves GPUs and TPUs, and this is {platform}: use --kernels auto")
    if platform != "cpu" or not placement.single or dtype != "float32":
        why = f"{platform}, {dtype}, {placement.mesh.size} device(s)"
        if config.kernels == "native":
            raise PlanError(
                f"--kernels native serves one CPU in float32, and this is {why}: use --kernels xla"
            )
        return plain, f"xla ({why})"
    report("kernels", 0, 1)
    native = native_kernels(Path(config.cache_dir) if config.cache_dir else default_cache_dir())
    report("kernels", 1, 1)
    if not isinstance(native, str):
        return native, native.name
    if config.kernels == "native":
        raise PlanError(f"--kernels native: {native}")
    return plain, f"xla ({native})"


def _refused(config: EngineConfig, blueprint: Blueprint) -> str:
    """What of the attention the chosen kernels leave to plain XLA, and why; empty if nothing."""
    b, shapes = blueprint, blueprint.shapes
    latent = "keys and values are in latent form" if b.config.latent and b.kernels.name != "xla" else ""
    programs: dict[str, list[str]] = {}
    for size in b.sizes:
        table = size.rows + b.segments(size), shapes.table_width
        if why := latent or b.kernels.refusal(shapes.page_tokens, table, b.kv_dtype):
            programs.setdefault(why, []).append(size.name)
    told = "; ".join(
        f"attention in {'all programs' if len(names) == len(b.sizes) else ', '.join(names)} is XLA's: {why}"
        for why, names in programs.items()
    )
    if told and config.kernels == "pallas":
        raise PlanError(f"--kernels pallas: {told}: use --kernels auto")
    return told and f"; {told}"


def _most_tokens(config: EngineConfig, model: ModelConfig) -> int:
    most = config.max_total_tokens or model.max_positions
    if most > model.max_positions:
        raise PlanError(
            f"max_total_tokens={most} is beyond the model's context of {model.max_positions} tokens: lower --max-total-tokens"
        )
    if config.max_input_tokens is not None and config.max_input_tokens >= most:
        raise PlanError(
            f"max_input_tokens={config.max_input_tokens} leaves no room to generate in max_total_tokens={most}: "
            "lower --max-input-tokens"
        )
    return most


def _watermark(config: EngineConfig) -> Watermark:
    gamma, delta = config.watermark_gamma, config.watermark_delta
    if not 0 < gamma < 1:
        raise PlanError(f"watermark_gamma={gamma} is not between 0 and 1 (--watermark-gamma)")
    if not math.isfinite(delta):
        raise PlanError(f"watermark_delta={delta} is not a finite number (--watermark-delta)")
    return Watermark(gamma, delta)


def _limit(config: EngineConfig, placement: Placement, platform: str, topology: Topology | None) -> int:
    """Bytes the engine may use, over all devices. Of several processes, the one with the least decides for all."""
    if topology is not None:
        return int(topology.chip.hbm_bytes * config.memory_fraction) * placement.mesh.size
    if platform == "cpu":
        return least_of_all(int(machine_bytes() * config.memory_fraction)) * jax.process_count()
    stats = placement.device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise PlanError("the device does not say how much memory it has; give --kv-bytes")
    return least_of_all(int(stats["bytes_limit"] * config.memory_fraction)) * placement.mesh.size


def slower(blueprint: Blueprint) -> str:
    """What is slower for the options taken than it would be without; empty if nothing is (docs/performance.md)."""
    platform = blueprint.placement.device.platform
    if platform == "cpu" and blueprint.quantize and not blueprint.kernels.packed:
        return (
            f"weights in {blueprint.quantize} save memory and cost speed here: XLA expands them anew in each step on CPUs; the "
            "native kernels do not"
        )
    wide = blueprint.shapes.kv_rows is not None and blueprint.shapes.kv_rows[1] > TPU_LANE
    if platform == "tpu" and blueprint.kv_dtype == "int8" and wide:
        return (
            "keys and values in int8 save memory and cost speed here: for heads of more than 128 numbers XLA copies a layer's "
            "pools in each launch on TPUs"
        )
    return ""


def load_weights(
    config: EngineConfig, blueprint: Blueprint, source: WeightSource | None, report: Progress
) -> Params:
    """The decoder's, or random ones without a source, and its heads' if any are asked for."""

    def place(spec):
        return param_sharding(blueprint.placement, spec)

    # First: what was not made for this model is refused at once.
    heads = load_heads(config, blueprint, source)
    if source is None:
        return (*dummy_params(blueprint.graph.specs, place, 0), *heads)
    if blueprint.config.kv_copies > 1:
        source = RepeatedHeads(source, blueprint.config)
    loaded = load_params(
        blueprint.graph.specs, source, place, lambda done, total: report("weights", done, total)
    )
    return (*loaded, *heads)
