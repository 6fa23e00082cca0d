"""Checkpoints as GPTQ, AWQ, compressed-tensors and makers of FP8 write them, packed value by value as their definitions read, and what their
weights are in full. Scales and zero points are such that bfloat16 holds them and their products."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.support.tiny import hf_tensors

Tensors = dict[str, np.ndarray]


def packed(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Whole numbers [R, C] -> int32[R, C * bits / 32], the first in the lowest bits; `order`: which of the values of a word
    comes when."""
    each = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // each), np.uint32)
    for place in range(each):
        taken = values[:, (order[place] if order else place) :: each]
        words |= taken.astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


class Stored:
    """One random linear map [N, D]: values, and for each group of inputs scale and zero point."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, int], bits: int, group: int, symmetric: bool
    ) -> None:
        outputs, inputs = shape
        groups = inputs // group if group else 1
        self.bits, middle = bits, 1 << (bits - 1)
        self.values = rng.integers(0, 1 << bits, shape)
        # Four bits of a scale times four of a zero point are eight, which bfloat16 has.
        self.scales = rng.integers(8, 16, (outputs, groups)) * 2.0 ** -(bits + 5)
        self.scales = self.scales.astype(np.float32)
        near = rng.integers(middle - 3, middle + 3, (outputs, groups))
        self.zeros = np.full((outputs, groups), middle) if symmetric else near
        self.index = np.arange(inputs) // (group or inputs)

    @property
    def full(self) -> np.ndarray:
        """float32[N, D]: the weight."""
        return ((self.values - self.zeros[:, self.index]) * self.scales[:, self.index]).astype(np.float32)

    def gptq(self, version: int, index: bool = True) -> Tensors:
        """Inputs in words, outputs in columns; the first version has zero points less one."""
        tensors = {
            "qweight": packed(self.values, self.bits).T,
            "qzeros": packed((self.zeros - (version == 1)).T, self.bits),
            "scales": self.scales.T.astype(np.float16),
        }
        return tensors | ({"g_idx": self.index.astype(np.int32)} if index else {})

    def awq(self) -> Tensors:
        """Outputs in words, in an order of their own."""
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": packed(self.values.T, 4, order),
            "qzeros": packed(self.zeros.T, 4, order),
            "scales": self.scales.T.astype(np.float16),
        }

    def words(self, symmetric: bool, index: bool) -> Tensors:
        """compressed-tensors' `pack-quantized`."""
        tensors = {
            "weight_packed": packed(self.values, self.bits),
            "weight_scale": self.scales,
            "weight_shape": np.array(self.values.shape, np.int64),
        }
        if not symmetric:
            tensors["weight_zero_point"] = packed(self.zeros.T, self.bits).T
        return tensors | ({"weight_g_idx": self.index.astype(np.int32)} if index else {})

    def bytes(self) -> Tensors:
        """compressed-tensors' `int-quantized`, with the scale of activations beside it."""
        return {
            "weight": (self.values - 128).astype(np.int8),
            "weight_scale": self.scales,
            "input_scale": np.ones(1, np.float32),
        }


def in_bits(
    plain: Path, to: Path, said: dict[str, Any], store: Any, leave: str = "lm_head"
) -> tuple[Path, Path]:
    """Two copies of a checkpoint with the same random linear maps: as `store(shape, module)` -> (Stored, tensors) has them,
    with `said` in config.json, and in full. Modules whose names match `leave` are in full in both."""
    few, full = to / "few", to / "full"
    for copy in (few, full):
        shutil.copytree(plain, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    in_few, in_full = {}, {}
    for name, tensor in hf_tensors(plain).items():
        module = name.removesuffix(".weight")
        in_few[name] = in_full[name] = tensor
        if tensor.ndim != 2 or re.search(leave, name) or "embed" in name:
            continue
        stored, tensors = store(tensor.shape, module)
        del in_few[name]
        in_few |= {f"{module}.{piece}": np.ascontiguousarray(value) for piece, value in tensors.items()}
        in_full[name] = stored.full
    save_file(in_few, few / "model.safetensors")
    save_file(in_full, full / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((few / "config.json").read_text())
    (few / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return few, full


def in_fp8(
    plain: Path, to: Path, said: dict[str, Any], end: str, block: int = 0, leave: str = "lm_head"
) -> tuple[Path, Path]:
    """Two copies of a checkpoint: its projections in FP8 with scales under `end`, one a block of so many rows and columns or one a
    row, the rest in bfloat16, with `said` in config.json; and the same numbers in full. What matches `leave` stays in bfloat16."""
    rng = np.random.default_rng(0)
    few, full = to / "few", to / "full"
    for copy in (few, full):
        shutil.copytree(plain, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    stored: Tensors = {}
    whole: Tensors = {}
    for name, value in hf_tensors(plain).items():
        stored[name] = value.astype(ml_dtypes.bfloat16)
        whole[name] = stored[name].astype(np.float32)
        if value.ndim != 2 or not re.search(r"proj\S*\.weight$", name) or re.search(leave, name):
            continue
        rows, columns = value.shape
        by = (-(-rows // block), -(-columns // block)) if block else (rows, 1)
        scale = rng.uniform(0.5, 2, by).astype(np.float32)
        spread = scale
        if block:
            spread = scale.repeat(block, axis=0)[:rows].repeat(block, axis=1)[:, :columns]
        stored[name] = (value / spread).astype(ml_dtypes.float8_e4m3fn)
        stored[name + end] = scale
        whole[name] = stored[name].astype(np.float32) * spread
    save_file(stored, few / "model.safetensors")
    save_file(whole, full / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((few / "config.json").read_text())
    (few / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return few, full
