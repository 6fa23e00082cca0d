"""What loading takes from the host, in bytes: one copy of the weights (on CPU the device's own) and a few parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

FLOAT32_BYTES = 300e6
"""Of the checkpoint's weights, about."""
LAYERS, HIDDEN, FFN, VOCAB, HEADS, KV_HEADS = 24, 512, 1536, 4096, 8, 4

CHILD = """
import json, sys
from pathlib import Path
import jax
from xlane.engine.programs import param_sharding
from xlane.models.decoder import DecoderGraph
from xlane.models.loader import load_params
from xlane.models.opened import open_model
from xlane.sharding.mesh import make_placement

def held(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

path, form, devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
opened = open_model(path)
placement = make_placement(1, devices)
graph = DecoderGraph.of(opened.config, "float32", packed="packed" in form, quant=next((q for q in ("int8", "int4") if q in form), None))
jax.block_until_ready(jax.numpy.zeros(8))
before = held("VmRSS")
params = load_params(graph.specs, opened.source, lambda spec: param_sharding(placement, spec))
jax.block_until_ready(params)
most = max(spec.nbytes for spec in graph.specs)
print(json.dumps({"taken": held("VmHWM") - before, "weights": sum(p.nbytes for p in jax.tree.leaves(params)), "most": most}))
"""


PROMPT_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""glibc gives freed blocks back at once: else what its arenas keep for later, which varies by 40 MB, is counted, too."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about 300 MB in float32, in two files with an index."""
    path = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    head, layer = HIDDEN // HEADS, "model.layers.{}.{}.weight"
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * head, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * head, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            shapes[layer.format(i, name)] = shape
    names = sorted(shapes)
    placed = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: rng.random(shapes[name], np.float32) for name in part}, path / file)
        placed |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "intermediate_size": FFN,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "max_position_embeddings": 512,
                "rms_norm_eps": 1e-5,
                "hidden_act": "silu",
                "tie_word_embeddings": False,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
        )
    )
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
@pytest.mark.parametrize(
    ("form", "devices"),
    [("plain", 1), ("packed", 1), ("plain", 4), ("int8", 1), ("packed int8", 1), ("int4", 4)],
)
def test_the_host_never_holds_a_second_copy(checkpoint: Path, form: str, devices: int):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(checkpoint), form, str(devices)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | PROMPT_MALLOC,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert (
        seen["weights"]
        > {"plain": 200e6, "packed": 200e6, "int8": 50e6, "packed int8": 50e6, "int4": 25e6}[form]
    )
    beside = seen["taken"] - seen["weights"]
    # Four in flight, each read and, on the way, cut or packed; of a quantised one some blocks of 1 MiB are there in full.
    assert beside < 8 * seen["most"] < 0.3 * FLOAT32_BYTES, seen
