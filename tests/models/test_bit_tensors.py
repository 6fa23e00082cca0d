"""GPTQ, AWQ and compressed-tensors: every layout against its definition, the logits of models stored so, and refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.test_decoder import OURS, TOLERANCE, Network, largest_error
from tests.models.test_loader import one_device
from tests.support.in_bits import Stored, Tensors, in_bits
from tests.support.tiny import hf_logits, tiny_model
from xlane.engine import EngineConfig, PlanError
from xlane.engine.build import design
from xlane.engine.kernels.native.calls import native_kernels
from xlane.models.attention import XlaKernels
from xlane.models.decoder import DecoderGraph
from xlane.models.errors import CheckpointError, UnsupportedModel
from xlane.models.loader import dummy_params, load_params
from xlane.models.opened import OpenedModel, open_model
from xlane.models.quantize import dequantized
from xlane.models.registry import read_config
from xlane.models.schemes import read_schemes
from xlane.models.spec import Quant, Quantized

GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "damp_percent": 0.01,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(weights: dict[str, Any], form: str, **more: Any) -> dict[str, Any]:
    weights = {"type": "int", "dynamic": False, "observer": "minmax", **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, **more}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


ROUNDED_TOO = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, bool, bool], Any, str | None]] = {
    "gptq": (GPTQ, (4, 32, True, False), lambda s: s.gptq(1), "int4"),
    "gptq-in-order": (
        GPTQ | {"checkpoint_format": "gptq_v2", "sym": False, "desc_act": True},
        (4, 32, False, True), lambda s: s.gptq(2), "int4",
    ),
    "gptq-8-bits": (GPTQ | {"bits": 8, "sym": False}, (8, 32, False, False), lambda s: s.gptq(1, False), None),
    "gptq-8-bits-in-order": (GPTQ | {"bits": 8, "desc_act": True}, (8, 32, True, True), lambda s: s.gptq(1), "int8"),
    "gptq-8-bits-a-row": (GPTQ | {"bits": 8, "group_size": -1}, (8, 0, True, False), lambda s: s.gptq(1), "int8"),
    "gptq-a-row": (GPTQ | {"group_size": -1, "desc_act": True}, (4, 0, True, False), lambda s: s.gptq(1), "int4"),
    "awq": (AWQ, (4, 32, False, False), lambda s: s.awq(), "int4"),
    "words": (
        compressed({"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True}, "pack-quantized"),
        (4, 32, True, False), lambda s: s.words(True, False), "int4",
    ),
    "words-in-order": (
        compressed(
            {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False, "actorder": "group"},
            "pack-quantized",
        ),
        (4, 32, False, True), lambda s: s.words(False, True), "int4",
    ),
    "words-8-bits": (
        compressed({"num_bits": 8, "strategy": "channel", "symmetric": True}, "pack-quantized"),
        (8, 0, True, False), lambda s: s.words(True, False), "int8",
    ),
    "bytes": (
        compressed({"num_bits": 8, "strategy": "channel", "symmetric": True}, "int-quantized", input_activations=ROUNDED_TOO),
        (8, 0, True, False), lambda s: s.bytes(), "int8",
    ),
}  # fmt: skip
IN_ORDER = "gptq-in-order"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """By name of a case and kind of a tiny model: as it is stored, and in full. Made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(case: str, kind: str = "llama-biases", leave: str = "lm_head") -> tuple[Path, Path]:
        if (case, kind) not in made:
            said, how, write, _ = CASES[case]
            rng = np.random.default_rng(0)
            orders: dict[str, int] = {}

            def store(shape: tuple[int, int], module: str) -> tuple[Stored, Tensors]:
                # What reads the same vector was measured on it, and has its inputs in one order.
                seed = orders.setdefault(str(shape[1]) + module.rpartition(".")[0], len(orders))
                stored = Stored(rng, shape, *how[:3])
                if how[3]:
                    stored.index = np.random.default_rng(seed).permutation(stored.index)
                return stored, write(stored)

            plain = tiny_model(kind, tmp_path_factory.getbasetemp() / "tiny")
            made[case, kind] = in_bits(plain, tmp_path_factory.mktemp(case), said, store, leave)
        return made[case, kind]

    return make


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_what_the_definition_says(checkpoint, case: str) -> None:
    """Exactly: kept in the leaf that holds it, or dequantised."""
    few, full = checkpoint(case)
    config = read_config(few)
    specs = DecoderGraph.of(config, "float32").specs
    leaf = CASES[case][3]
    kinds = {spec.quant for spec in specs if spec.path.endswith(("qkv.weight", "down.weight"))}
    assert kinds == {leaf}
    opened, reference = open_model(few), open_model(full)
    assert opened.source is not None
    assert reference.source is not None
    params = load_params(specs, opened.source, one_device)
    by_path = {spec.path: param for spec, param in zip(specs, params, strict=True)}
    for spec in DecoderGraph.of(reference.config, "float32").specs:
        want = reference.source.read(spec, tuple(slice(0, size) for size in spec.shape))
        got = by_path[spec.path]
        got = np.asarray(dequantized(got, jnp.float32) if isinstance(got, Quantized) else got)
        order = by_path.get(spec.path.removesuffix(".weight") + ".order")
        if order is not None:
            want = want[..., np.asarray(order)]
        np.testing.assert_array_equal(got, want, err_msg=spec.path)


@pytest.mark.parametrize(
    ("case", "kernels", "devices"),
    [
        (IN_ORDER, "native", 1),
        (IN_ORDER, "xla", 2),
        ("gptq-8-bits-in-order", "native", 1),
        ("gptq-8-bits-in-order", "xla", 2),
    ],
)
def test_the_logits_are_those_of_the_weights_in_full(
    checkpoint, tmp_path_factory: pytest.TempPathFactory, case: str, kernels: str, devices: int
) -> None:
    few, full = checkpoint(case)
    chosen = XlaKernels("cpu")
    if kernels == "native":
        chosen = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
        if isinstance(chosen, str):
            pytest.skip(chosen)
    got = Network(few, chosen, devices)(OURS[:12], [0] * 12, list(range(12)), False)
    assert largest_error(got, hf_logits(full, OURS[:12])) <= TOLERANCE


def test_experts_are_kept_each_as_stored_and_what_chooses_them_is_left_alone(checkpoint) -> None:
    said, how, write, _ = CASES["awq"]
    CASES["awq-experts"] = (said | {"modules_to_not_convert": ["gate"]}, how, write, "int4")
    few, full = checkpoint("awq-experts", "mixtral", leave="lm_head|gate")
    opened, reference = open_model(few), open_model(full)
    specs = {spec.path: spec for spec in DecoderGraph.of(opened.config, "float32").specs}
    assert specs["layers.1.experts.router.weight"].quant is None
    assert opened.source is not None
    assert reference.source is not None
    opened.source.check(tuple(specs.values()))
    spec = specs["layers.1.experts.gate_up.weight"]
    assert (spec.quant, spec.as_stored) == ("int4", True)
    # A piece from the middle: experts 1 and 2, the second of the two projections, outputs that divide no word.
    index = (slice(1, 3), slice(1, 2), slice(3, 21), slice(0, 64))
    parts = [jnp.asarray(part) for part in opened.source.read_parts(spec, index)]
    want = reference.source.read(replace(spec, quant=None), index)
    np.testing.assert_array_equal(dequantized(Quantized(*parts), jnp.float32), want)


def test_other_bits_are_made_of_what_is_stored_if_they_are_asked_for(checkpoint) -> None:
    config = read_config(checkpoint(IN_ORDER)[0])

    def kinds(quant: Quant | None) -> dict[str, tuple[Quant | None, bool]]:
        specs = DecoderGraph.of(config, "float32", quant=quant).specs
        return {
            spec.path: (spec.quant, spec.as_stored)
            for spec in specs
            if spec.path in ("head.weight", "layers.0.out.weight")
        }

    assert kinds(None) == {"layers.0.out.weight": ("int4", True), "head.weight": (None, False)}
    assert kinds("int4") == {"layers.0.out.weight": ("int4", True), "head.weight": ("int8", False)}
    assert kinds("int8") == {"layers.0.out.weight": ("int8", False), "head.weight": ("int8", False)}


def test_random_weights_have_an_order_too(checkpoint) -> None:
    specs = DecoderGraph.of(read_config(checkpoint(IN_ORDER)[0]), "float32").specs
    params = dummy_params(specs, one_device)
    assert {np.asarray(p).max() for spec, p in zip(specs, params) if spec.path.endswith(".order")} == {0}


def opened(checkpoint, tmp_path: Path, case: str, changes: dict[str, Any], tensors: Tensors) -> OpenedModel:
    """A checkpoint with other tensors and another quantization_config; None takes one out."""
    few, _ = checkpoint(case)
    config = json.loads((few / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    merged = load_file(few / "model.safetensors") | tensors
    save_file({k: v for k, v in merged.items() if v is not None}, tmp_path / "model.safetensors")
    return open_model(tmp_path)


def load(model: OpenedModel) -> None:
    assert model.source is not None
    load_params(DecoderGraph.of(model.config, "float32").specs, model.source, one_device)


DOWN = "model.layers.1.mlp.down_proj"
QUERIES = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("case", "tensors", "problem"),
    [
        ("gptq", {DOWN + ".scales": np.ones((2, 64), np.float16)}, r"down_proj\.scales is \(2, 64\).* asks for \(3, 64\)"),
        ("gptq", {DOWN + ".qzeros": None}, "down_proj has no tensor of zero points"),
        ("gptq", {DOWN + ".g_idx": np.arange(96, dtype=np.int32) % 3}, "puts inputs in another order"),
        (IN_ORDER, {DOWN + ".g_idx": np.zeros(96, np.int32)}, "does not divide inputs into groups of 32"),
        (IN_ORDER, {QUERIES + ".g_idx": np.arange(64, dtype=np.int32) // 32}, "different orders"),
        (IN_ORDER, {DOWN + ".g_idx": None}, r"no tensor of groups by index \(g_idx\)"),
        ("words", {DOWN + ".qweight": np.ones((8, 8), np.int32)}, "is no part of what config.json's quantization_config says"),
        ("words", {DOWN + ".weight_packed": None, DOWN + ".weight": np.ones((64, 96), np.float32)}, "not in the few bits"),
        ("gptq-8-bits-a-row", {DOWN + ".qzeros": np.zeros((1, 16), np.int32)}, "says that there are none"),
        ("gptq", {"model.norm.bias": np.zeros(64, np.float32)}, "is used by no parameter"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    checkpoint, tmp_path: Path, case: str, tensors: Any, problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        load(opened(checkpoint, tmp_path, case, {}, tensors))


def test_biases_of_zeros_that_old_writers_left_are_no_matter(checkpoint, tmp_path: Path) -> None:
    few, _ = checkpoint("gptq", "qwen3")
    tensors = load_file(few / "model.safetensors")
    for value, problem in ((0.0, False), (0.5, True)):
        tensors[DOWN + ".bias"] = np.full(64, value, np.float16)
        save_file(tensors, few / "model.safetensors")
        if problem:
            with pytest.raises(CheckpointError, match=r"down_proj\.bias is used by no parameter"):
                load(open_model(few))
        else:
            load(open_model(few))


def test_scales_are_rounded_to_what_the_leaf_keeps_and_zero_stays_zero(checkpoint, tmp_path: Path) -> None:
    scales = np.random.default_rng(0).uniform(0.01, 0.02, (3, 64)).astype(np.float16)
    source = opened(checkpoint, tmp_path, "gptq", {}, {DOWN + ".scales": scales}).source
    assert source is not None
    (spec,) = (
        s for s in DecoderGraph.of(read_config(tmp_path), "float32").specs if s.path == "layers.1.down.weight"
    )
    parts = [jnp.asarray(part) for part in source.read_parts(spec, (slice(0, 64), slice(0, 96)))]
    values = np.asarray(dequantized(Quantized(*parts), jnp.float32)).reshape(64, 3, 32)
    kept = scales.T.astype(ml_dtypes.bfloat16).astype(np.float32)[..., None]
    steps = values / kept
    np.testing.assert_array_equal(steps, np.round(steps))
    assert (steps.min(), steps.max()) == (-8, 7)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bits": 3}, "quantization_config: bits = 3: supported: 4, 8"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin': supported: gptq, gptq_v2"),
        ({"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic = .*bits of their own"),
        ({"rotation": "hadamard"}, "rotation = 'hadamard': this option is not understood"),
        ({"quant_method": "aqlm"}, r"quant_method = 'aqlm'.* not read \(gptq, awq, compressed-tensors, fp8, mxfp4, and GGUF"),
        ({"dynamic": {"-:(": {}}}, r"'\(\?:\(\)\.\*' is no pattern"),
    ],
)  # fmt: skip
def test_options_that_are_not_understood_are_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedModel, match=problem):
        read_schemes({"quantization_config": GPTQ | changes})


FLOAT = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"quant_method": "fp8", "twist": 1}, "quantization_config: twist = 1: this option is not understood"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt = 'e5m2': supported: e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\]: supported: \[128, 128\]"),
        (compressed(FLOAT | {"strategy": "block", "block_structure": [1, 128]}, "float-quantized"), r"block_structure = \[1, 128\]"),
        (compressed(FLOAT | {"strategy": "block"}, "float-quantized"), "block_structure is missing"),
        (compressed(FLOAT | {"strategy": "group"}, "float-quantized"), "strategy = 'group': supported: tensor, channel, block"),
    ],
)  # fmt: skip
def test_options_of_fp8_that_are_not_understood_are_refused_by_name(
    said: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UnsupportedModel, match=problem):
        read_schemes({"quantization_config": said})


@pytest.mark.parametrize(
    ("said", "module", "stored"),
    [
        (GPTQ, "lm_head", False),
        (GPTQ | {"lm_head": True}, "lm_head", True),
        (GPTQ | {"dynamic": {r"-:model\.layers\.0\.": {}}}, "model.layers.0.mlp.down_proj", False),
        (GPTQ | {"dynamic": {r"-:model\.layers\.0\.": {}}}, "model.layers.1.mlp.down_proj", True),
        (GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj"]]}, "model.layers.1.mlp.down_proj", False),
        (AWQ | {"modules_to_not_convert": ["down_proj"]}, "model.layers.1.mlp.down_proj", False),
        ({"quant_method": "fp8", "ignored_layers": ["mlp.down_proj"]}, "model.layers.1.mlp.down_proj", False),
        ({"quant_method": "fp8", "modules_to_not_convert": None}, "model.layers.1.mlp.down_proj", True),
        (CASES["words"][0] | {"ignore": ["re:.*down_proj"]}, "model.layers.1.mlp.down_proj", False),
        (CASES["words"][0] | {"ignore": ["model.layers.0.mlp.up_proj"]}, "model.layers.1.mlp.up_proj", True),
    ],
)  # fmt: skip
def test_which_modules_are_stored_in_few_bits(said: dict[str, Any], module: str, stored: bool) -> None:
    assert (read_schemes({"quantization_config": said}).of(module) is not None) == stored


def test_what_the_command_line_says_of_the_checkpoint_must_be_so(checkpoint) -> None:
    model = read_config(checkpoint("gptq")[0])
    blueprint = design(EngineConfig(model_id="m", quantize="gptq", kernels="xla"), model)[0]
    assert blueprint.quantize == "int4"
    with pytest.raises(PlanError, match="--quantize awq: this checkpoint is quantised by gptq"):
        design(EngineConfig(model_id="m", quantize="awq", kernels="xla"), model)
