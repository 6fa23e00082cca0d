"""FP8 checkpoints: each layout of scales against the definition, and the logits of a model stored so."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.test_decoder import OURS, TOLERANCE, Network, largest_error
from tests.support.in_bits import in_fp8
from tests.support.tiny import hf_logits, tiny_model
from xlane.models.checkpoint import open_safetensors
from xlane.models.errors import CheckpointError
from xlane.models.fp8 import Fp8Tensors
from xlane.models.kernels import Kernels
from xlane.models.quantize import dequantized
from xlane.models.spec import Quantized

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


BLOCKS = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
}
LEFT = r"layers\.0\.mlp\.down_proj"
"""In full, and nothing in config.json says so."""


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"], "config_groups": {"0": group},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "said", "end", "block", "kept"),
    [
        ("qwen3", BLOCKS, "_scale_inv", 128, {}),
        ("qwen3", {"quant_method": "fp8"}, "_scale", 0, {"qkv.weight": 0, "down.weight": 0}),
        ("qwen3", compressed(strategy="channel"), "_scale", 0, {"qkv.weight": 0, "out.weight": 0}),
        (
            "qwen3-blocks",
            compressed(strategy="block", block_structure=[128, 128]),
            "_scale",
            128,
            {"qkv.weight": 128, "out.weight": 128, "gate_up.weight": 128, "down.weight": 128},
        ),
        (
            "deepseek_v3-blocks",
            BLOCKS,
            "_scale_inv",
            128,
            {
                "latent.q_down.weight": 128,
                "latent.down.weight": 128,
                "out.weight": 128,
                "experts.gate_up.weight": 128,
                "experts.down.weight": 128,
                "experts.shared.down.weight": 128,
            },
        ),
    ],
    ids=[
        "blocks that do not divide",
        "rows",
        "compressed-tensors",
        "compressed-tensors' blocks",
        "DeepSeek's blocks",
    ],
)
def test_a_model_of_fp8_answers_as_the_same_in_full(
    kind: str,
    said: dict[str, Any],
    end: str,
    block: int,
    kept: dict[str, int],
    kernels: Kernels,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """As they are published: projections in FP8, but for one that nothing names, the rest in bfloat16."""
    plain = tiny_model(kind, tmp_path_factory.getbasetemp() / "tiny")
    few, full = in_fp8(plain, tmp_path, said, end, block, leave=f"lm_head|{LEFT}")
    network = Network(few, kernels, 1 if kernels.packed else 2)
    specs = {spec.path: spec for spec in network.graph.specs}
    for path, group in kept.items():
        spec = specs["layers.1." + path]
        assert (spec.quant, spec.as_stored, spec.group) == ("fp8", True, group), path
    assert specs["layers.0.down.weight"].quant is None
    if kept:
        held = sum(spec.nbytes for spec in specs.values() if spec.quant)
        count = sum(math.prod(spec.shape) for spec in specs.values() if spec.quant)
        assert count < held < 1.2 * count  # a byte each, and scales
    got = network(OURS[:12], [0] * 12, list(range(12)), False)
    assert largest_error(got, hf_logits(full, OURS[:12])) <= TOLERANCE
