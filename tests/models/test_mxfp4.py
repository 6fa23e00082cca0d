"""MXFP4: by hand, against transformers' own reading, and a gpt-oss checkpoint stored so."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.tiny import hf_tensors, tiny_model
from xlane.models.checkpoint import open_safetensors
from xlane.models.decoder import DecoderGraph
from xlane.models.errors import CheckpointError
from xlane.models.mxfp4 import Mxfp4Tensors, dequantized
from xlane.models.opened import open_model


def test_by_hand() -> None:
    blocks, scales = np.zeros((1, 1, 16), np.uint8), np.array([[128]], np.uint8)
    blocks[0, 0, 0], blocks[0, 0, 1] = 0x31, 0xF7  # 0.5, 1.5, 6, -6 before the shared exponent of 1
    assert dequantized(blocks, scales)[0, :5].tolist() == [1.0, 3.0, 12.0, -12.0, 0.0]


def test_as_transformers_reads_it() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 6, 2, 16), dtype=np.uint8)
    scales = rng.integers(110, 140, (3, 6, 2), dtype=np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    ours = dequantized(blocks, scales).swapaxes(-1, -2).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs.float().numpy())


@pytest.fixture
def quantized(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with random MXFP4 experts, in the layout of the published checkpoints."""
    plain, path = tiny_model("gpt_oss", tmp_path_factory.getbasetemp() / "tiny"), tmp_path / "gpt-oss"
    shutil.copytree(plain, path)
    tensors, rng = hf_tensors(plain), np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[name + "_blocks"] = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        tensors[name + "_scales"] = rng.integers(120, 127, (experts, outputs, inputs // 32), dtype=np.uint8)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_checkpoint_becomes_the_decoders_parameters(quantized: Path) -> None:
    opened = open_model(quantized)
    assert opened.source is not None
    specs = {spec.path: spec for spec in DecoderGraph.of(opened.config, "bfloat16").specs}
    opened.source.check(tuple(specs.values()))
    stored = hf_tensors(quantized)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rows = dequantized(stored[name + "_blocks"], stored[name + "_scales"])
    spec = specs["layers.1.experts.gate_up.weight"]
    read = opened.source.read(spec, (slice(1, 3), *(slice(0, size) for size in spec.shape[1:])))
    # Row 2f is the gate of hidden unit f, row 2f+1 what it multiplies.
    np.testing.assert_array_equal(read[:, 0], rows[1:3, 0::2])
    np.testing.assert_array_equal(read[:, 1], rows[1:3, 1::2])


def test_halves_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = {"w_blocks": np.zeros((2, 4, 1, 16), np.uint8), "w_scales": np.zeros((2, 4, 2), np.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no MXFP4"):
        Mxfp4Tensors(open_safetensors(tmp_path)).shape("w")
