"""Run as a process of its own: compile one model's largest programs for a topology and print what came out, as JSON.

python -m tests.chips.facts TOPOLOGY MODEL LAYERS
"""

import json
import re
import sys
from dataclasses import asdict
from typing import Any

from xlane.engine.audit import faults
from xlane.engine.build import design
from xlane.engine.config import EngineConfig
from xlane.engine.hlo import collectives, moves, sorts
from xlane.engine.plan import largest
from xlane.engine.programs import compile_all
from xlane.engine.state import abstract_state, held_bytes
from xlane.models.registry import config_from_hf
from xlane.tpu.chips import compile_only_devices, find_topology

LANES, CHUNK_TOKENS, CONTEXT_TOKENS = 16, 256, 8192

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": CONTEXT_TOKENS, "vocab_size": 128256, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "8b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128, "tie_word_embeddings": False},
    "1b": _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True},
}  # fmt: skip
"""Llama 3.1 8B and Llama 3.2 1B."""


def pool_elements(shape: str) -> int:
    """Keys, or values, of one layer: every lane may hold a whole context."""
    return LANES * CONTEXT_TOKENS * 8 * SHAPES[shape]["head_dim"]


def facts(topology_name: str, shape: str, layers: int) -> dict[str, Any]:
    """Of the largest program of each kind."""
    topology = find_topology(topology_name)
    devices = compile_only_devices(topology)
    model = config_from_hf(SHAPES[shape] | {"num_hidden_layers": layers})
    config = EngineConfig(model_id=shape, lanes=LANES, prefill_chunk_tokens=CHUNK_TOKENS)
    blueprint, memory, kernels = design(config, model, topology=topology, devices=devices)
    blueprint = largest(blueprint)
    programs = compile_all(blueprint)
    state_bytes = held_bytes(abstract_state(blueprint.shapes, blueprint.placement))
    told: dict[str, Any] = {}
    for info in programs.infos:
        text = programs[info.name].as_text()
        told[info.name] = asdict(info) | {
            "collectives": [one._asdict() for one in collectives(text)],
            "moves": moves(text, pool_elements(shape) // topology.count),
            "sorts": sorts(text, SHAPES[shape]["vocab_size"]),
            "kernels": re.findall(r"custom-call\(.*?\b(xlane_[a-z_]+)", text),
        }
    return {
        "programs": told,
        "faults": faults(programs),
        "devices": topology.count,
        "kernels": kernels,
        "state_bytes": state_bytes,
        "planned_temp_bytes": memory.temp_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
