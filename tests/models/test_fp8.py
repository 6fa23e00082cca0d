"""FP8 checkpoints: each layout of scales against the definition, and the logits of a model stored so."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.test_decoder import OURS, TOLERANCE, Network, largest_error
from tests.support.tiny import hf_logits, hf_tensors, tiny_model
from xlane.models.attention import XlaKernels
from xlane.models.checkpoint import open_safetensors
from xlane.models.errors import CheckpointError
from xlane.models.fp8 import FP8, Fp8Tensors
from xlane.models.modules import as_stored, param
from xlane.models.quantize import dequantized
from xlane.models.spec import Quant, Quantized

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


@pytest.mark.parametrize(
    ("shape", "end", "group"),
    [((2, 2), "_scale_inv", 128), ((ROWS, 1), "_scale", 0), ((), "_scale", 0)],
    ids=str,
)
def test_the_leaf_is_what_is_stored(tmp_path: Path, shape: tuple[int, ...], end: str, group: int) -> None:
    """Bit for bit, and multiplied out what the definition says."""
    scale = np.asarray(RNG.uniform(0.5, 2, shape), np.float32)
    values = np.ascontiguousarray(VALUES[:, :256])
    save_file({"a.weight": values, "a.weight" + end: scale}, tmp_path / "model.safetensors")
    source = Fp8Tensors(open_safetensors(tmp_path))
    assert [source.holds("a.weight", "fp8", size) for size in (0, 128)] == [not group, bool(group)]
    stored, scales = (source.leaf("fp8", part).read_rows("a.weight", 100, 150) for part in (0, 1))
    np.testing.assert_array_equal(stored.view(np.uint8), values[100:150].view(np.uint8))
    got = dequantized(Quantized(jnp.asarray(stored), jnp.asarray(scales)), jnp.float32)
    np.testing.assert_array_equal(got, source.read_rows("a.weight", 100, 150))


@pytest.mark.parametrize(
    ("said", "end", "kept"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}, "_scale_inv", False),
        ({"quant_method": "fp8"}, "_scale", True),
        (
            {
                "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
                "config_groups": {"0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
            },
            "_scale", True,
        ),
    ],
    ids=["blocks that do not divide", "rows", "compressed-tensors"],
)  # fmt: skip
def test_a_model_of_fp8_answers_as_the_same_in_full(
    said: dict[str, Any], end: str, kept: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As they are published: projections in FP8, but for one that nothing names, the rest in bfloat16."""
    plain = tiny_model("qwen3", tmp_path_factory.getbasetemp() / "tiny")
    few, full = tmp_path / "few", tmp_path / "full"
    shutil.copytree(plain, few)
    shutil.copytree(plain, full)
    stored: dict[str, np.ndarray] = {}
    whole: dict[str, np.ndarray] = {}
    for name, value in hf_tensors(plain).items():
        whole[name] = value.astype(ml_dtypes.bfloat16).astype(np.float32)
        stored[name] = value.astype(ml_dtypes.bfloat16)
        if name.endswith("proj.weight") and name != "model.layers.0.mlp.down_proj.weight":
            rows = (1, 1) if end == "_scale_inv" else (len(value), 1)
            scale = RNG.uniform(0.5, 2, rows).astype(np.float32)
            stored[name] = (value / scale).astype(FP8)
            stored[name + end] = scale
            whole[name] = stored[name].astype(np.float32) * scale
    save_file(stored, few / "model.safetensors")
    save_file(whole, full / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((few / "config.json").read_text())
    (few / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    network = Network(few, XlaKernels("cpu"), 2)
    quants = {spec.path: spec.quant for spec in network.graph.specs if spec.path.startswith("layers.")}
    assert quants["layers.0.qkv.weight"] == quants["layers.1.down.weight"] == ("fp8" if kept else None)
    assert quants["layers.0.down.weight"] is None
    if kept:
        held = sum(spec.nbytes for spec in network.graph.specs if spec.quant)
        count = sum(math.prod(spec.shape) for spec in network.graph.specs if spec.quant)
        assert count < held < 1.2 * count  # a byte each, and scales
    got = network(OURS[:12], [0] * 12, list(range(12)), False)
    assert largest_error(got, hf_logits(full, OURS[:12])) <= TOLERANCE


def test_native_kernels_are_given_it_in_full() -> None:
    weight = param((32, 64), (None, None), "float32", packed=True)
    kinds: list[tuple[Quant, int]] = [("fp8", 0), ("fp8", 32), ("int8", 32)]
    for quant, group in kinds:
        assert as_stored(weight, quant, group) is weight
