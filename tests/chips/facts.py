"""Run as a process of its own: compile one model's largest programs for a topology and print what came out, as JSON.

python -m tests.chips.facts TOPOLOGY MODEL LAYERS [KV_DTYPE [QUANTIZE]]
"""

import json
import math
import re
import sys
from dataclasses import asdict
from typing import Any

from tests.bench.dummy_model import SHAPES
from xlane.engine.audit import faults
from xlane.engine.build import design
from xlane.engine.config import EngineConfig
from xlane.engine.hlo import collectives, moves, sorts
from xlane.engine.plan import largest
from xlane.engine.programs import compile_all
from xlane.engine.state import abstract_kv, abstract_state, held_bytes
from xlane.models.registry import config_from_hf
from xlane.tpu.chips import compile_only_devices, find_topology

LANES, CHUNK_TOKENS, CONTEXT_TOKENS = 16, 256, 8192


def pool_elements(shape: str) -> int:
    """Keys, or values, of one layer: every lane may hold a whole context."""
    return LANES * CONTEXT_TOKENS * 8 * SHAPES[shape]["head_dim"]


def scale_moves(text: str, shape: tuple[int, ...]) -> list[str]:
    """See `moves`, of int8's scales: their size alone would not tell them from what a launch computes."""
    return [line for line in moves(text, math.prod(shape)) if f"f32[{','.join(map(str, shape))}]" in line]


def facts(
    topology_name: str, shape: str, layers: int, kv_dtype: Any = None, quantize: Any = None
) -> dict[str, Any]:
    """Of the largest program of each kind."""
    topology = find_topology(topology_name)
    devices = compile_only_devices(topology)
    model = config_from_hf(SHAPES[shape] | {"num_hidden_layers": layers})
    config = EngineConfig(
        model_id=shape, lanes=LANES, prefill_chunk_tokens=CHUNK_TOKENS, kv_dtype=kv_dtype, quantize=quantize
    )
    blueprint, memory, kernels = design(config, model, topology=topology, devices=devices)
    blueprint = largest(blueprint)
    programs = compile_all(blueprint)
    keys = abstract_kv(model, blueprint.shapes, blueprint.kv_dtype, blueprint.placement)[0].k
    scales = keys.sharding.shard_shape(keys.shape)[:3]
    state_bytes = held_bytes(abstract_state(blueprint.shapes, blueprint.placement))
    told: dict[str, Any] = {}
    for info in programs.infos:
        text = programs[info.name].as_text()
        told[info.name] = asdict(info) | {
            "collectives": [one._asdict() for one in collectives(text)],
            "moves": moves(text, pool_elements(shape) // topology.count),
            "scale moves": scale_moves(text, scales),
            "sorts": sorts(text, SHAPES[shape]["vocab_size"]),
            "kernels": re.findall(r"custom-call\(.*?\b(xlane_[a-z_]+)", text),
        }
    return {
        "programs": told,
        "faults": faults(programs),
        "devices": topology.count,
        "kernels": kernels,
        "kv_dtype": blueprint.kv_dtype,
        "state_bytes": state_bytes,
        "planned_temp_bytes": memory.temp_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])))
