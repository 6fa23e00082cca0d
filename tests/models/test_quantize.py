"""Weights of 8 and 4 bits: by hand, through both kernels, and from a checkpoint onto one device and several."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.models.test_loader import one_device, opened, split
from tests.support.rounding import FINITE, in_bytes, rounded
from tests.support.tiny import tiny_model
from xlane.engine.kernels.native.calls import native_kernels
from xlane.models import loader
from xlane.models.attention import XlaKernels
from xlane.models.decoder import DecoderGraph
from xlane.models.kernels import Kernels
from xlane.models.loader import dummy_params, load_params
from xlane.models.quantize import dequantized, quantized
from xlane.models.registry import read_config
from xlane.models.spec import ParamSpec, Quant, Quantized, pack

QUANTS = ("int8", "int4")
BYTES = [("int8", 32), ("fp8", 0), ("fp8", 32)]
"""What checkpoints alone have: kind, and inputs that share a scale."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


def on_device(weight: Quantized[np.ndarray]) -> Quantized[jax.Array]:
    return jax.tree.map(jnp.asarray, weight)


def test_int8_by_hand() -> None:
    weight = np.array([[1.27, -0.636, 0.004, -0.02], [0, 0, 0, 0], [-2.54, 2.54, 1.28, 0]], np.float32)
    values, scales, _ = quantized(weight, "int8")
    assert values.tolist() == [[127, -64, 0, -2], [0, 0, 0, 0], [-127, 127, 64, 0]]
    np.testing.assert_allclose(scales, [[0.01], [0], [0.02]], rtol=1e-6)
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)


def test_int4_by_hand() -> None:
    """From the smallest of 32 to the largest in 15 steps; a group of one number has its floor alone."""
    weight = np.zeros((1, 96), np.float32)
    weight[0, [0, 1, 16, 31]] = [-4, 3.5, 1.5, -0.3]  # steps of 0.5 from -4
    weight[0, 32:64] = 1
    weight[0, [32, 47, 48]] = [4.75, 2, 3.1]  # steps of 0.25 from 1
    weight[0, 64:] = -0.75
    values, scales, floors = quantized(weight, "int4")
    assert floors is not None
    assert (values.shape, values.dtype, scales.dtype) == ((1, 48), np.uint8, ml_dtypes.bfloat16)
    assert (scales.tolist(), floors.tolist()) == ([[0.5, 0.25, 0]], [[-4, 1, -0.75]])
    # Input i of a group is in the low half of byte i, input i + 16 in the high one; 0 is step 8 of the first group.
    first = [0x80 + 8] * 16
    first[0], first[1], first[15] = 0xB0, 0x8F, 0x78
    second = [0] * 16
    second[0], second[15] = 0x8F, 0x04
    assert values[0].tolist() == first + second + [0] * 16
    back = np.asarray(dequantized(on_device(Quantized(values, scales, floors)), jnp.float32))
    assert back[0, [0, 1, 2, 16, 31, 32, 33, 47, 48, 95]].tolist() == [
        -4,
        3.5,
        0,
        1.5,
        -0.5,
        4.75,
        1,
        2,
        3,
        -0.75,
    ]


@pytest.mark.parametrize("quant", QUANTS)
def test_no_weight_moves_by_more_than_half_a_step(quant: Quant) -> None:
    """But for what the rounding of floor and of 15 steps to bfloat16 takes from the ends of a group."""
    weight = np.random.default_rng(0).standard_normal((40, 96), dtype=np.float32)
    made = quantized(weight, quant)
    back = np.asarray(dequantized(on_device(made), jnp.float32))
    np.testing.assert_allclose(back, rounded(weight, quant), atol=1e-6)
    groups = np.abs(back - weight).reshape(40, made.scales.shape[1], -1)
    step = made.scales.astype(np.float32)[..., None]
    ends = (
        0
        if made.floors is None
        else 2.0**-9 * (np.abs(made.floors.astype(np.float32))[..., None] + 15 * step)
    )
    assert (groups <= step * (0.5 + 1e-4) + ends).all()


def test_a_weight_that_had_4_bits_keeps_them() -> None:
    """As llama.cpp's Q4_0 stores it: steps of one scale from -8 to 7, both met."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-8, 8, (20, 3, 32)).astype(np.float32)
    steps[..., :2] = [-8, 7]
    weight = (steps * rng.uniform(0.01, 0.02, (20, 3, 1)).astype(np.float32)).reshape(20, 96)
    values = quantized(weight, "int4").values
    pairs = values.reshape(20, 3, 16)
    np.testing.assert_array_equal(np.concatenate([pairs & 15, pairs >> 4], axis=-1), steps + 8)


@partial(jax.jit, static_argnums=(0, 3))
def _linear(kernels, x, weight, outputs):
    return kernels.linear(x, weight, outputs)


def linear(kernels: Kernels, x: np.ndarray, made: Quantized[np.ndarray]) -> np.ndarray:
    stored = on_device(jax.tree.map(pack, made) if kernels.packed else made)
    return np.asarray(_linear(kernels, jnp.asarray(x), stored, len(made.values)))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11, 16, 17, 70])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (5, 64), (100, 96), (960, 576)])
@pytest.mark.parametrize("quant", QUANTS)
def test_linear_matches_numpy(kernels: Kernels, quant: Quant, outputs: int, inputs: int, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, inputs), dtype=np.float32)
    weight = rng.standard_normal((outputs, inputs), dtype=np.float32)
    stands_for = rounded(weight, quant).astype(np.float64)
    # Of n fused multiply-adds, and of the weight itself, which is a sum of two numbers below 8.
    sizes = np.abs(x).astype(np.float64)
    bound = 2.0**-24 * (
        (inputs + 2) * sizes @ np.abs(stands_for).T + 2 * 8 * sizes.sum(axis=1, keepdims=True)
    )
    got = linear(kernels, x, quantized(weight, quant))
    assert (np.abs(got - x.astype(np.float64) @ stands_for.T) <= bound).all()


@pytest.mark.parametrize("tokens", [1, 5, 17, 70])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 64), (100, 96), (960, 576)])
@pytest.mark.parametrize(("kind", "group"), BYTES)
def test_linear_of_stored_bytes_matches_numpy(
    kernels: Kernels, kind: str, group: int, outputs: int, inputs: int, tokens: int
) -> None:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, inputs), dtype=np.float32)
    values, scales, full = in_bytes(rng, kind, group, outputs, inputs)
    bound = 2.0**-24 * (inputs + 2) * np.abs(x).astype(np.float64) @ np.abs(full).T
    got = linear(kernels, x, Quantized(values, scales))
    assert (np.abs(got - x.astype(np.float64) @ full.T) <= bound).all()


def test_every_number_of_fp8_is_itself(kernels: Kernels) -> None:
    """The smallest too, which other kernels might take for nothing."""
    x, values = np.eye(1, 8, 3, np.float32), np.zeros((len(FINITE), 8), FINITE.dtype)
    values[:, 3] = FINITE
    for scales in (np.ones((len(FINITE), 1), np.float32), np.ones((len(FINITE), 2), np.float32)):
        got = linear(kernels, x, Quantized(values, scales))
        np.testing.assert_array_equal(got[0], FINITE.astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("quant", QUANTS)
def test_accelerators_multiply_in_bfloat16(quant: Quant, tokens: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, 96), dtype=np.float32).astype(ml_dtypes.bfloat16)
    weight = rng.standard_normal((40, 96), dtype=np.float32)
    got = _linear(XlaKernels("gpu"), jnp.asarray(x), on_device(quantized(weight, quant)), 40)
    assert got.dtype == jnp.bfloat16
    stands_for = rounded(weight, quant).astype(np.float64)
    want, sizes = x.astype(np.float64) @ stands_for.T, np.abs(x).astype(np.float64) @ np.abs(stands_for).T
    # One rounding of a result; 4 bits round each weight as well.
    rounding = 2.0**-8 * (np.abs(want) + (sizes if quant == "int4" else 0.01 * sizes))
    assert (np.abs(np.asarray(got, np.float64) - want) <= rounding).all()


def test_int8_needs_no_whole_groups(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((3, 7), (20, 7)))
    got = linear(kernels, x, quantized(weight, "int8"))
    np.testing.assert_allclose(got, x @ rounded(weight, "int8").T, atol=1e-5)


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 0), *BYTES])
def test_a_row_is_the_same_bits_in_any_batch(
    kind: Quant, group: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    native = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    if isinstance(native, str):
        pytest.skip(native)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 576), dtype=np.float32)
    if (kind, group) in BYTES:
        made = Quantized(*in_bytes(rng, kind, group, 1000, 576)[:2])
    else:
        made = quantized(rng.standard_normal((1000, 576), dtype=np.float32), kind)
    whole = linear(native, x, made)
    for tokens in [*range(1, 20), 64]:
        np.testing.assert_array_equal(linear(native, x[:tokens], made), whole[:tokens])
    np.testing.assert_array_equal(linear(native, x[50:51], made), whole[50:51])


@pytest.mark.parametrize("quant", QUANTS)
def test_the_native_one_refuses_what_does_not_fit(
    quant: Quant, tmp_path_factory: pytest.TempPathFactory
) -> None:
    native = native_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    if isinstance(native, str):
        pytest.skip(native)
    made = on_device(jax.tree.map(pack, quantized(np.ones((20, 64), np.float32), quant)))
    with pytest.raises(ValueError, match="do not give 40 outputs"):
        native.linear(jnp.zeros((1, 64)), made, 40)
    short = made._replace(scales=made.scales[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"scales .* do not fit together"):
        native.linear(jnp.zeros((1, 64)), short, 20)


def whole_parts(specs: tuple[ParamSpec, ...], path: Path) -> list[list[np.ndarray]]:
    """Every parameter read whole, then quantised."""
    found = []
    for spec in specs:
        full = ParamSpec(spec.path, spec.shape, "float32", spec.axes)
        weight = opened(path).read(full, tuple(slice(0, n) for n in spec.shape))
        found.append([weight] if spec.quant is None else jax.tree.leaves(quantized(weight, spec.quant)))
    return found


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("quant", QUANTS)
def test_shards_are_slices_of_the_whole_read_in_blocks(
    models: Path, quant: Quant, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("llama-biases", models, sharded=True)
    specs = DecoderGraph.of(read_config(path), "float32", quant=quant).specs
    expected = whole_parts(specs, path)
    read: list[int] = []

    class Counting:
        def __getattr__(self, name: str):
            return getattr(opened(path), name)

        def read(self, spec: ParamSpec, index) -> np.ndarray:
            block = opened(path).read(spec, index)
            if spec.path.endswith(".weight"):
                read.append(block.nbytes)
            return block

    monkeypatch.setattr(loader, "BLOCK_BYTES", 3 * 64 * 4)

    def sharding_for(spec: ParamSpec) -> jax.sharding.Sharding:
        return split(axis if len(spec.shape) > max(axis, 0) else 0, spec)

    params = load_params(specs, Counting(), sharding_for)
    for spec, param, parts in zip(specs, params, expected, strict=True):
        assert isinstance(param, Quantized) == spec.path.endswith(".weight")
        for array, part in zip(jax.tree.leaves(param), parts, strict=True):
            np.testing.assert_array_equal(array, part, err_msg=spec.path)
    assert max(read) <= 3 * 64 * 4


@pytest.mark.parametrize("quant", QUANTS)
def test_packed_ones_are_panels(models: Path, quant: Quant) -> None:
    path = tiny_model("llama-biases", models)
    specs = DecoderGraph.of(read_config(path), "float32", packed=True, quant=quant).specs
    for spec, param, parts in zip(
        specs, load_params(specs, opened(path), one_device), whole_parts(specs, path)
    ):
        for array, part in zip(jax.tree.leaves(param), parts, strict=True):
            np.testing.assert_array_equal(array, pack(part) if spec.packed else part, err_msg=spec.path)
        assert sum(array.nbytes for array in jax.tree.leaves(param)) == spec.nbytes


def test_what_is_kept_in_how_many_bits(models: Path) -> None:
    """By path, in 4 bits: tables of vectors have 8, and so has what does not divide into groups."""
    path = tiny_model("llama-head-dim", models)  # 24 wide: 4 heads make 96 inputs
    config = read_config(path)
    kinds = {spec.path: spec.quant for spec in DecoderGraph.of(config, "float32", quant="int4").specs}
    short = {path.removeprefix("layers.0."): quant for path, quant in kinds.items() if "layers.1" not in path}
    assert short == {
        "embed.weight": "int8", "head.weight": "int8", "norm.scale": None, "attn_norm.scale": None,
        "mlp_norm.scale": None, "qkv.weight": "int4", "out.weight": "int4", "gate_up.weight": "int4",
        "down.weight": "int4",
    }  # fmt: skip
    odd = read_config(tiny_model("bloom-odd-heads", models))  # 48 wide
    kinds = {spec.path: spec.quant for spec in DecoderGraph.of(odd, "float32", quant="int4").specs}
    assert (kinds["layers.0.qkv.weight"], kinds["layers.0.down.weight"]) == ("int8", "int4")


@pytest.mark.parametrize("quant", QUANTS)
def test_dummy_parameters_stand_for_numbers_of_the_usual_size(models: Path, quant: Quant) -> None:
    specs = DecoderGraph.of(read_config(tiny_model("qwen3", models)), "float32", quant=quant).specs
    params = dummy_params(specs, one_device)
    for spec, param in zip(specs, params, strict=True):
        weight = np.asarray(dequantized(param, jnp.float32)) if isinstance(param, Quantized) else param
        assert weight.shape == spec.shape
        if spec.quant:
            assert 0.015 < weight.std() < 0.025, spec.path
            assert np.abs(weight).max() < 0.036
