"""The compiled programs alone on this device: time of a decode step and of a prefill launch, next to what memory and
arithmetic allow, with the kernels that took longest.

    python -m tests.bench.device_step [--model 8b|1b|CONFIG.json] [--rows 1,64,256] [--context 1024] [--prefill 2048]
        [--mixed 64+256] [--quantize int8|int4] [--kv-dtype int8] [--kernels pallas,xla] [--layers N] [--profile FOLDER]

Weights are random. Every row holds `context` tokens of its own pages. No scheduler, no host work: launches are chained and
waited for at the end, so a figure is the device's. Prints a line a figure, and one JSON line last.
"""

import argparse
import dataclasses
import gzip
import json
import math
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.bench.dummy_model import SHAPES
from xlane.engine.batch import pack_plan
from xlane.engine.bench import Ceilings, measure_ceilings
from xlane.engine.build import design
from xlane.engine.config import EngineConfig
from xlane.engine.programs import compile_all, param_sharding
from xlane.engine.request import SamplingParams
from xlane.engine.roofline import Roofline
from xlane.engine.sampler import mask_width
from xlane.engine.state import abstract_kv, abstract_state, zeros_like
from xlane.engine.step import Blueprint
from xlane.engine.turn import NO_PAGE, Row, Segment, Size
from xlane.models.config import ModelConfig
from xlane.models.loader import dummy_params
from xlane.models.registry import config_from_hf
from xlane.tpu.runtime import set_gpu_defaults


def main() -> None:
    args = _arguments()
    set_gpu_defaults(os.environ)
    shape = json.loads(Path(args.model).read_text()) if args.model.endswith(".json") else SHAPES[args.model]
    model = config_from_hf(shape | ({"num_hidden_layers": args.layers} if args.layers else {}))
    ceilings = measure_ceilings(jax.devices()[0].platform, args.dtype)
    print(f"ceilings {ceilings}", flush=True)
    figures: list[dict[str, Any]] = []
    params = None
    for kernels in args.kernels.split(","):
        blueprint = _designed(args, model, kernels)
        if params is None:
            place = partial(param_sharding, blueprint.placement)
            params = dummy_params(blueprint.graph.specs, place)
        figures += _measured(args, kernels, blueprint, params, _roofline(blueprint, ceilings))
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "figures": figures}))


def _designed(args: argparse.Namespace, model: ModelConfig, kernels: str) -> Blueprint:
    rows = sorted(map(int, args.rows.split(",")))
    mixed = [Size(*map(int, each.split("+"))) for each in args.mixed.split(",") if each]
    lanes = max([rows[-1], *(size.rows + 1 for size in mixed)])  # a prompt has a lane of its own
    config = EngineConfig(
        model_id="dummy", lanes=lanes, kernels=kernels, dtype=args.dtype, kv_bytes=args.kv_bytes,
        max_total_tokens=max(args.context + 512, args.prefill + 64), prefill_chunk_tokens=args.prefill,
        quantize=args.quantize, kv_dtype=args.kv_dtype,
    )  # fmt: skip
    blueprint, _, note = design(config, model)
    print(f"{kernels}: {note}", flush=True)
    sizes = (*(Size(count, 0) for count in rows), *mixed, Size(0, args.prefill))
    return dataclasses.replace(blueprint, sizes=sizes, prefill_segments=1)


def _roofline(blueprint: Blueprint, ceilings: Ceilings) -> Roofline:
    place = blueprint.placement
    return Roofline(
        config=blueprint.config, specs=blueprint.graph.specs, kv_dtype=blueprint.kv_dtype,
        kv_rows=blueprint.shapes.kv_rows, split=place.model_size,
        copies=place.data_size, read_bytes_per_s=ceilings.read_gb_per_s * 1e9,
        flops_per_s=ceilings.matmul_gflop_per_s * 1e9,
    )  # fmt: skip


def _measured(
    args: argparse.Namespace, kernels: str, blueprint: Blueprint, params: Any, roofline: Roofline
) -> list[dict[str, Any]]:
    began = time.perf_counter()
    programs = compile_all(blueprint)
    print(f"compiled {len(programs.infos)} programs in {time.perf_counter() - began:.1f} s", flush=True)
    for info in programs.infos:
        print(
            f"  {info.name} {info.compile_s:.1f} s, temporaries {info.temp_bytes / 2**20:.0f} MiB", flush=True
        )
    launches = _Launches(blueprint, programs, params, args.context)
    figures = []
    for size in blueprint.sizes:
        seconds = launches.run(size, args.steps if size.rows else 4)
        # Neither alone allows a launch that does both to be quicker than the slower of them.
        least_s = max(
            roofline.decode_s(size.rows, args.context) if size.rows else 0.0,
            roofline.prefill_s(size.tokens) if size.tokens else 0.0,
        )
        figures.append(_figure(size.name, kernels, seconds, least_s, size.rows + size.tokens))
        if args.profile:
            _profiled(partial(launches.run, size, 4), Path(args.profile) / f"{kernels}-{size.name}")
    return figures


class _Launches:
    """Arrays that live on the device, and the launches over them."""

    def __init__(self, blueprint: Blueprint, programs: Any, params: Any, context: int) -> None:
        self.blueprint, self.programs, self.params, self.context = blueprint, programs, params, context
        shapes, place = blueprint.shapes, blueprint.placement
        self.kv = zeros_like(abstract_kv(blueprint.config, shapes, blueprint.kv_dtype, place))
        self.state = zeros_like(abstract_state(shapes, place))

    def _held(self) -> None:
        """Every lane holds `context` tokens and goes on."""
        shapes = self.blueprint.shapes
        # Fewer pages than a full pool would take are shared: what is read is as much.
        table = np.arange(shapes.lanes * shapes.table_width, dtype=np.int32) % shapes.pages
        put = self.blueprint.placement.put
        ones = np.ones(shapes.lanes, np.float32)
        sampling = self.state.sampling._replace(
            repetition=put(ones.copy()),
            top_p=put(ones.copy()),
            typical_p=put(ones.copy()),
            stop=put(np.full(self.state.sampling.stop.shape, -1, np.int32)),
        )
        self.state = self.state._replace(
            position=put(np.full(shapes.lanes, self.context, np.int32)),
            remaining=put(np.full(shapes.lanes, 10**6, np.int32)),
            active=put(np.ones(shapes.lanes, bool)),
            table=put(table.reshape(shapes.lanes, -1)),
            sampling=sampling,
        )

    def _mask(self, rows: int) -> jax.Array:
        return self.blueprint.placement.put(
            np.zeros((rows, mask_width(self.blueprint.shapes.vocab)), np.int32)
        )

    def run(self, size: Size, times: int) -> float:
        """Seconds a launch: lanes that decode, beside them a prompt in a lane of its own, which it fills anew each time."""
        self._held()
        b = self.blueprint
        rows = [Row(lane, 0, NO_PAGE) for lane in range(size.rows)]
        pages = -(-size.tokens // b.shapes.page_tokens)
        prompt = Segment(
            lane=b.shapes.lanes - 1, tokens=[1] * size.tokens, start=0, last=True, prompt_tokens=size.tokens, remaining=8,
            recorded=0, prompt_top=0, targets=(), pages=list(range(pages)), sampling=SamplingParams(max_tokens=8),
        )  # fmt: skip
        prompts = [prompt] if size.tokens else []
        segments = b.segments(size)
        packed = pack_plan(rows, prompts, size, segments, b.shapes.table_width, b.shapes.lanes)
        plan, mask = b.placement.put(packed), self._mask(size.rows + segments)

        def launch(count: int) -> None:
            for _ in range(count):
                self.kv, self.state, _ = self.programs(size, self.params, self.kv, self.state, plan, mask)
            jax.block_until_ready(self.state)

        return _timed(launch, times)


def _timed(run: Any, count: int) -> float:
    run(2)
    began = time.perf_counter()
    run(count)
    return (time.perf_counter() - began) / count


def _figure(name: str, kernels: str, seconds: float, least_s: float, tokens: int) -> dict[str, Any]:
    print(
        f"{kernels:7} {name:14} {seconds * 1e3:8.3f} ms, at least {least_s * 1e3:.3f} ms ({least_s / seconds:.0%}), "
        f"{tokens / seconds:.0f} tokens/s",
        flush=True,
    )
    return {"program": name, "kernels": kernels, "ms": seconds * 1e3, "least_ms": least_s * 1e3}


def _profiled(run: Any, folder: Path, most: int = 14) -> None:
    """Print the kernels that took longest, from the profiler's trace."""
    with jax.profiler.trace(str(folder)):
        run()
    took: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for path in folder.rglob("*.trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        streams = {
            (e["pid"], e["tid"])
            for e in events
            if e.get("name") == "thread_name" and "Stream" in str(e["args"].get("name"))
        }
        for event in events:
            if event.get("ph") == "X" and (event["pid"], event.get("tid")) in streams:
                took[event["name"]] += event["dur"]
                times[event["name"]] += 1
    total = math.fsum(took.values())
    print(f"  profile {folder.name}: {total / 1e3:.2f} ms of kernels in all")
    for name, micros in took.most_common(most):
        print(f"    {micros / total:6.1%} {micros / times[name]:9.1f} us x {times[name]:5d}  {name[:90]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="8b", help="8b, 1b, or a Hugging Face config.json")
    parser.add_argument("--rows", default="1,64,256")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--mixed", default="", help="decoding lanes + prompt tokens of one launch, as 64+256")
    parser.add_argument("--quantize", choices=("int8", "int4"), default=None)
    parser.add_argument("--kv-dtype", choices=("int8",), default=None)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kv-bytes", type=int, default=None)
    parser.add_argument("--profile", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
