"""FP8 checkpoints: each layout of scales against the definition, and the logits of a model stored so."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.tiny import hf_tensors, tiny_model
from xlane.models.checkpoint import open_safetensors
from xlane.models.decoder import DecoderGraph
from xlane.models.errors import CheckpointError
from xlane.models.fp8 import Fp8Tensors
from xlane.models.opened import open_model

ROWS, COLUMNS = 200, 300
RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((ROWS, COLUMNS)).astype(ml_dtypes.float8_e4m3fn)


def opened(path: Path, scale: np.ndarray, end: str) -> Fp8Tensors:
    """A file with one scaled weight, one plain tensor and a scale of activations."""
    tensors = {"a.weight": VALUES, "a.weight" + end: scale, "a.input_scale": np.ones(1, np.float32)}
    save_file({**tensors, "b.weight": VALUES}, path / "model.safetensors")
    return Fp8Tensors(open_safetensors(path))


@pytest.mark.parametrize(
    ("shape", "end"),
    [((2, 3), "_scale_inv"), ((ROWS, 1), "_scale"), ((ROWS,), "_scale"), ((1,), "_scale"), ((), "_scale")],
    ids=str,
)
def test_every_layout_of_scales(tmp_path: Path, shape: tuple[int, ...], end: str) -> None:
    scale = np.asarray(RNG.uniform(0.5, 2, shape), np.float32)
    source = opened(tmp_path, scale, end)
    assert set(source.names()) == {"a.weight", "b.weight"}
    assert source.dtype("a.weight") == np.float32
    factor = np.broadcast_to(scale.reshape(-1, 1) if shape[:1] == (ROWS,) else scale, (ROWS, COLUMNS)) if shape != (2, 3) else (
        np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:ROWS, :COLUMNS]
    )  # fmt: skip
    want = VALUES.astype(np.float32) * factor
    np.testing.assert_array_equal(source.read_rows("a.weight", 0, ROWS), want)
    np.testing.assert_array_equal(source.read_rows("a.weight", 120, 140), want[120:140])
    np.testing.assert_array_equal(source.read_rows("b.weight", 3, 5), VALUES[3:5])


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.weight \(200, 300\) has a scale \(7,\)"):
        opened(tmp_path, np.ones(7, np.float32), "_scale").dtype("a.weight")


def test_a_model_of_fp8_and_bfloat16(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As Qwen publishes them: projections in FP8, the rest in bfloat16, and the configuration says so."""
    plain = tiny_model("qwen3", tmp_path_factory.getbasetemp() / "tiny")
    path = tmp_path / "qwen3-fp8"
    shutil.copytree(plain, path)
    tensors: dict[str, np.ndarray] = {}
    for name, value in hf_tensors(plain).items():
        if name.endswith("proj.weight"):
            tensors[name] = value.astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = np.full((1, 1), 0.5, ml_dtypes.bfloat16)
        else:
            tensors[name] = value.astype(ml_dtypes.bfloat16)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (path / "config.json").write_text(json.dumps(config))
    model = open_model(path)
    assert model.source is not None
    specs = {spec.path: spec for spec in DecoderGraph.of(model.config, "float32").specs}
    model.source.check(tuple(specs.values()))
    spec = specs["layers.1.down.weight"]
    read = model.source.read(spec, tuple(slice(0, size) for size in spec.shape))
    want = tensors["model.layers.1.mlp.down_proj.weight"].astype(np.float32) * 0.5
    np.testing.assert_array_equal(read, want)
