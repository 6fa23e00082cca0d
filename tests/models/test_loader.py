"""Loading onto devices: every parameter equals transformers' weights, on one device and on eight, packed or not."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from tests.support.specs import specs_by_hand
from tests.support.tiny import TINY_KINDS, hf_tensors, tiny_model
from xlane.models.checkpoint import SafetensorsSource, open_checkpoint
from xlane.models.config import ModelConfig
from xlane.models.errors import CheckpointError
from xlane.models.families.hf_names import IGNORED_TENSORS, WEIGHTS
from xlane.models.loader import THREADS, dummy_params, load_params
from xlane.models.quantize import quantized
from xlane.models.registry import read_config
from xlane.models.spec import ParamSpec, pack
from xlane.models.weights import Index, Weights, plain, qkv


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


def one_device(spec: ParamSpec) -> jax.sharding.Sharding:
    return SingleDeviceSharding(jax.devices()[0])


def split(axis: int, spec: ParamSpec) -> jax.sharding.Sharding:
    """Over eight devices along one axis where that divides, else copied to all."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("model",))
    names: list[str | None] = [None] * len(spec.shape)
    if spec.shape[axis] % len(jax.devices()) == 0:
        names[axis] = "model"
    return NamedSharding(mesh, PartitionSpec(*names))


def opened(path: Path) -> Weights:
    return open_checkpoint(path, WEIGHTS, IGNORED_TENSORS)


def expected(config: ModelConfig, spec: ParamSpec, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The parameter put together from transformers' tensors with plain reshapes."""
    layer, _, short = spec.path.removeprefix("layers.").partition(".")
    if not spec.path.startswith("layers."):
        layer, short = "", spec.path
    layer, kind = f"model.layers.{layer}.", spec.path.rsplit(".", 1)[1]
    group = (config.kv_heads, config.heads // config.kv_heads, config.head_dim)
    if ".qkv." in spec.path:
        q, k, v = (tensors[f"{layer}self_attn.{name}_proj.{kind}"] for name in "qkv")
        rest = q.shape[1:]
        pair = [t.reshape(config.kv_heads, 1, config.head_dim, *rest) for t in (k, v)]
        return np.concatenate([q.reshape(*group, *rest), *pair], axis=1)
    if ".gate_up." in spec.path:
        return np.stack([tensors[f"{layer}mlp.{name}_proj.{kind}"] for name in ("gate", "up")])
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "attn_norm.scale": f"{layer}input_layernorm.weight",
        "mlp_norm.scale": f"{layer}post_attention_layernorm.weight",
        "q_norm.scale": f"{layer}self_attn.q_norm.weight",
        "k_norm.scale": f"{layer}self_attn.k_norm.weight",
        f"out.{kind}": f"{layer}self_attn.o_proj.{kind}",
        f"down.{kind}": f"{layer}mlp.down_proj.{kind}",
    }
    return tensors[names[short]]


LLAMA_NAMES = [
    kind for kind in TINY_KINDS if kind.split("-")[0] in ("llama", "mistral", "qwen2", "qwen3", "smollm3")
]
"""Kinds whose tensors have Llama's names; the others are loaded for their logits, in test_decoder.py."""


@pytest.mark.parametrize("kind", LLAMA_NAMES)
def test_every_family_loads_what_transformers_saved(models: Path, kind: str):
    path = tiny_model(kind, models)
    config = read_config(path)
    specs, tensors = specs_by_hand(config), hf_tensors(path)
    arrays = load_params(specs, opened(path), one_device)
    assert len(arrays) == len(specs)
    for spec, array in zip(specs, arrays, strict=True):
        np.testing.assert_array_equal(array, expected(config, spec, tensors), err_msg=spec.path)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", ["llama-mqa", "qwen2", "llama-biases"])
def test_shards_are_the_slices_of_the_whole(models: Path, kind: str, axis: int):
    path = tiny_model(kind, models, sharded=True)
    config = read_config(path)
    specs, tensors = specs_by_hand(config), hf_tensors(path)
    by_axis = [spec for spec in specs if len(spec.shape) > max(axis, 0)]

    def sharding_for(spec: ParamSpec) -> jax.sharding.Sharding:
        return split(axis, spec) if spec in by_axis else split(0, spec)

    for spec, array in zip(specs, load_params(specs, opened(path), sharding_for), strict=True):
        assert array.shape == spec.shape
        assert len(array.sharding.device_set) == 8
        np.testing.assert_array_equal(array, expected(config, spec, tensors), err_msg=spec.path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_are_panels(models: Path, dtype: str):
    path = tiny_model("llama-biases", models)
    config = read_config(path)
    specs, tensors = specs_by_hand(config, dtype, packed=True), hf_tensors(path)
    for spec, array in zip(specs, load_params(specs, opened(path), one_device), strict=True):
        logical = expected(config, spec, tensors).astype(np.dtype(dtype))
        assert array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(array, pack(logical) if spec.packed else logical, err_msg=spec.path)


def test_progress_counts_every_byte(models: Path):
    path = tiny_model("llama-mha", models)
    specs = specs_by_hand(read_config(path))
    calls: list[tuple[int, int]] = []
    load_params(specs, opened(path), one_device, lambda done, total: calls.append((done, total)))
    total = sum(spec.nbytes for spec in specs)
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


class Counting:
    """A source of zeros that counts how much is being read at once."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.lock = threading.Lock()
        self.now = self.most = self.reads = 0

    def check(self, specs: Sequence[ParamSpec]) -> None:
        pass

    def by_entry(self, spec: ParamSpec) -> bool:
        return False

    def read(self, spec: ParamSpec, index: Index) -> np.ndarray:
        with self.lock:
            self.now, self.reads = self.now + 1, self.reads + 1
            self.most = max(self.most, self.now)
        try:
            if spec.path == self.failing:
                raise CheckpointError(f"{spec.path} is broken")
            return np.zeros(spec.shape, spec.dtype)[index]
        finally:
            with self.lock:
                self.now -= 1


def many(count: int) -> list[ParamSpec]:
    return [ParamSpec(f"p{i}", (8, 4), "float32", (None, None)) for i in range(count)]


def test_few_parameters_are_in_flight():
    source = Counting()
    load_params(many(40), source, one_device)
    assert source.most <= THREADS


def test_a_split_of_the_inputs_reads_all_rows_once():
    source = Counting()
    load_params([ParamSpec("p", (4, 8), "float32", (None, None))], source, partial(split, 1))
    assert source.reads == 1


class Experts(Counting):
    """Random numbers, whole experts at a time."""

    def by_entry(self, spec: ParamSpec) -> bool:
        return True

    def read(self, spec: ParamSpec, index: Index) -> np.ndarray:
        super().read(spec, index)
        assert all(part.indices(size)[:2] == (0, size) for part, size in zip(index[1:], spec.shape[1:]))
        return np.random.default_rng(0).standard_normal(spec.shape, np.float32)[index]


@pytest.mark.parametrize("shape", [(3, 2, 200, 1024), (3, 512, 1024), (6, 32, 1024)], ids=str)
def test_an_expert_that_is_read_whole_is_read_once(shape: tuple[int, ...]):
    """A block of rows would cost the whole of it: of a published model up to 224 times."""
    spec = ParamSpec("experts.up", shape, "float32", (None,) * len(shape), stacked=True, quant="int8")
    source = Experts()
    (loaded,) = load_params([spec], source, one_device)
    assert source.reads <= shape[0]
    wanted = quantized(np.random.default_rng(0).standard_normal(shape, np.float32), "int8")
    for part, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(part, other)


def test_which_experts_are_read_whole():
    """Those that lie in one tensor; rows of others, and of what is fused of several, are read alone."""
    experts = ParamSpec("layers.0.experts.up.weight", (4, 8, 8), "float32", (None,) * 3)
    one = replace(experts, path="layers.0.experts.down.weight")
    fused = replace(experts, path="layers.0.qkv.weight", shape=(2, 3, 4, 8))
    table = {
        "layers.{i}.experts.up.weight": plain("{i}.up.{e}"),
        "layers.{i}.experts.down.weight": plain("{i}.down"),
        "layers.{i}.qkv.weight": qkv("{i}.q", "{i}.k", "{i}.v"),
    }
    weights = Weights(SafetensorsSource([]), table)
    assert [weights.by_entry(spec) for spec in (experts, one, fused)] == [False, True, False]


def test_a_failure_stops_the_loading():
    source = Counting(failing="p3")
    with pytest.raises(CheckpointError, match="p3 is broken"):
        load_params(many(400), source, one_device)
    assert source.reads < 400


def test_a_checkpoint_that_does_not_fit_is_refused_before_reading(models: Path):
    path = tiny_model("qwen2", models)
    specs = specs_by_hand(read_config(tiny_model("llama-gqa-tied", models)))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is used by no parameter"):
        load_params(specs, opened(path), one_device)


def test_dummy_parameters(models: Path):
    config = read_config(tiny_model("qwen3", models))
    specs = specs_by_hand(config, "bfloat16")
    arrays = dummy_params(specs, partial(split, 0), seed=3)
    for spec, array in zip(specs, arrays, strict=True):
        assert (array.shape, array.dtype) == (spec.stored_shape, np.dtype(spec.dtype))
        assert array.sharding.is_equivalent_to(split(0, spec), len(spec.shape))
        values = np.asarray(array, np.float32)
        if spec.path.endswith(".scale"):
            assert (values == 1).all()
        else:
            assert 0.01 < values.std() < 0.03
    again = dummy_params(specs, partial(split, 0), seed=3)
    other = dummy_params(specs, partial(split, 0), seed=4)
    np.testing.assert_array_equal(arrays[0], again[0])
    assert (np.asarray(arrays[0]) != np.asarray(other[0])).any()
    qkv = [np.asarray(a) for s, a in zip(specs, arrays, strict=True) if s.path.endswith("qkv.weight")]
    assert (qkv[0] != qkv[1]).any(), "parameters of one shape are not the same numbers"
