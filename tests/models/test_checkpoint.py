"""Safetensors and weight tables: equal to what the safetensors library reads, and every way to be wrong is named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.specs import specs_by_hand
from tests.support.tiny import hf_tensors, tiny_model
from xlane.models.checkpoint import INDEX, SINGLE, SafetensorsSource, open_checkpoint, open_safetensors
from xlane.models.config import ModelConfig
from xlane.models.errors import CheckpointError
from xlane.models.families.hf_names import IGNORED_TENSORS, WEIGHTS
from xlane.models.registry import read_config
from xlane.models.spec import ParamSpec
from xlane.models.weights import Weights, either, gate_up, plain, qkv

TINY = ModelConfig(
    family="llama", vocab_size=7, hidden_size=4, layers=1, heads=6, kv_heads=2, head_dim=2, ffn_size=5,
    max_positions=16, norm_eps=1e-5, rope_theta=1e4, qkv_bias=True, tied_embeddings=True,
)  # fmt: skip


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """A checkpoint for one-layer configurations like TINY, each number different."""
    d, q, kv, f = (
        config.hidden_size,
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
        config.ffn_size,
    )
    at = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,),
        f"{at}input_layernorm.weight": (d,), f"{at}post_attention_layernorm.weight": (d,),
        f"{at}self_attn.q_proj.weight": (q, d), f"{at}self_attn.q_proj.bias": (q,),
        f"{at}self_attn.k_proj.weight": (kv, d), f"{at}self_attn.k_proj.bias": (kv,),
        f"{at}self_attn.v_proj.weight": (kv, d), f"{at}self_attn.v_proj.bias": (kv,),
        f"{at}self_attn.o_proj.weight": (d, q), f"{at}mlp.down_proj.weight": (d, f),
        f"{at}mlp.gate_proj.weight": (f, d), f"{at}mlp.up_proj.weight": (f, d),
    }  # fmt: skip
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def qkv_by_hand(tensors: dict[str, np.ndarray], what: str) -> np.ndarray:
    """[K, G+2, H, …], head by head."""
    q, k, v = (tensors[f"model.layers.0.self_attn.{name}_proj.{what}"] for name in "qkv")
    h, group = TINY.head_dim, TINY.heads // TINY.kv_heads
    groups = []
    for kv in range(TINY.kv_heads):
        queries = [q[(kv * group + g) * h : (kv * group + g + 1) * h] for g in range(group)]
        groups.append(np.stack([*queries, k[kv * h : (kv + 1) * h], v[kv * h : (kv + 1) * h]]))
    return np.stack(groups)


def spec_of(path: str, dtype: str = "float32") -> ParamSpec:
    return next(spec for spec in specs_by_hand(TINY, dtype) if spec.path == path)


def whole(spec: ParamSpec) -> tuple[slice, ...]:
    return (slice(None),) * len(spec.shape)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(tensors_of(TINY), tmp_path / SINGLE)
    return tmp_path


def opened(directory: Path) -> Weights:
    return open_checkpoint(directory, WEIGHTS, IGNORED_TENSORS)


def complaint(directory: Path, specs: list[ParamSpec] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(directory).check(specs or specs_by_hand(TINY))
    return str(caught.value)


def resave(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = tensors_of(TINY)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def test_fused_layouts_equal_hand_assembled_ones(checkpoint: Path):
    tensors, weights = tensors_of(TINY), opened(checkpoint)
    weights.check(specs_by_hand(TINY))
    for path, expected in {
        "layers.0.qkv.weight": qkv_by_hand(tensors, "weight"),
        "layers.0.qkv.bias": qkv_by_hand(tensors, "bias"),
        "layers.0.gate_up.weight": np.stack([tensors[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")]),
        "layers.0.down.weight": tensors["model.layers.0.mlp.down_proj.weight"],
        "norm.scale": tensors["model.norm.weight"],
    }.items():  # fmt: skip
        np.testing.assert_array_equal(weights.read(spec_of(path), whole(spec_of(path))), expected)


@pytest.mark.parametrize(
    "path", ["embed.weight", "layers.0.qkv.weight", "layers.0.qkv.bias", "layers.0.gate_up.weight"]
)
def test_any_slice_equals_the_slice_of_the_whole(checkpoint: Path, path: str):
    weights, spec = opened(checkpoint), spec_of(path)
    full = weights.read(spec, whole(spec))
    random = np.random.default_rng(1)
    for _ in range(40):
        bounds = [sorted(random.integers(0, size + 1, 2).tolist()) for size in spec.shape]
        index = tuple(slice(start, stop) for start, stop in bounds)
        np.testing.assert_array_equal(weights.read(spec, index), full[index])


FUSED = {
    "layers.{i}.qkv.weight": qkv("h.{i}.qkv", transposed=True),
    "layers.{i}.qkv.bias": qkv("h.{i}.qkv_bias"),
    "layers.{i}.gate_up.weight": gate_up("h.{i}.gate_up"),
    "layers.{i}.by_head.weight": plain("h.{i}.by_head", 3),
    "layers.{i}.down.weight": either(plain("h.{i}.newer"), plain("h.{i}.down", transposed=True)),
}


def test_joined_and_transposed_tensors_give_what_their_parts_would(tmp_path: Path):
    random = np.random.default_rng(2)
    q, k, v = (random.standard_normal((rows, 4), np.float32) for rows in (12, 4, 4))
    gate, up, down = (random.standard_normal(shape, np.float32) for shape in ((5, 4), (5, 4), (4, 5)))
    grouped = np.concatenate([q.reshape(2, 3, 2, 4), k.reshape(2, 1, 2, 4), v.reshape(2, 1, 2, 4)], axis=1)
    tensors = {
        "h.0.qkv": np.concatenate([q, k, v]).T.copy(),
        "h.0.qkv_bias": np.concatenate([q, k, v])[:, 0].copy(),
        "h.0.gate_up": np.concatenate([gate, up]),
        "h.0.by_head": grouped.reshape(20, 4),
        "h.0.down": down.T.copy(),
    }
    save_file(tensors, tmp_path / SINGLE)
    weights = open_checkpoint(tmp_path, FUSED)
    expected = {
        "layers.0.qkv.weight": grouped,
        "layers.0.qkv.bias": grouped[..., 0],
        "layers.0.gate_up.weight": np.stack([gate, up]),
        "layers.0.by_head.weight": grouped,
        "layers.0.down.weight": down,
    }
    specs = [
        ParamSpec(path, value.shape, "float32", (None,) * value.ndim) for path, value in expected.items()
    ]
    weights.check(specs)
    for spec in specs:
        for _ in range(20):
            bounds = [sorted(random.integers(0, size + 1, 2).tolist()) for size in spec.shape]
            index = tuple(slice(start, stop) for start, stop in bounds)
            np.testing.assert_array_equal(weights.read(spec, index), expected[spec.path][index], spec.path)
    save_file({**tensors, "h.0.newer": down}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"h\.0\.down is used by no parameter"):
        open_checkpoint(tmp_path, FUSED).check(specs)


def test_a_checkpoint_saved_without_its_head_is_read_by_the_names_it_has(tmp_path: Path):
    tensors = tensors_of(TINY)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}, tmp_path / SINGLE)
    weights = opened(tmp_path)
    weights.check(specs_by_hand(TINY))
    spec = spec_of("layers.0.down.weight")
    np.testing.assert_array_equal(
        weights.read(spec, whole(spec)), tensors["model.layers.0.mlp.down_proj.weight"]
    )


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_types_are_cast_to_the_spec(tmp_path: Path, stored: type, wanted: str):
    path, tensors = tmp_path / SINGLE, {name: t.astype(stored) for name, t in tensors_of(TINY).items()}
    save_file(tensors, path)
    spec = spec_of("layers.0.qkv.weight", wanted)
    found = opened(tmp_path).read(spec, whole(spec))
    assert found.dtype == np.dtype(wanted)
    np.testing.assert_array_equal(found, qkv_by_hand(tensors, "weight").astype(wanted))


def test_tensors_of_one_parameter_may_differ_in_type(tmp_path: Path):
    tensors = tensors_of(TINY)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, tmp_path / SINGLE)
    spec = spec_of("layers.0.qkv.weight", "bfloat16")
    np.testing.assert_array_equal(
        opened(tmp_path).read(spec, whole(spec)), qkv_by_hand(tensors, "weight").astype(ml_dtypes.bfloat16)
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_our_reader_equals_the_safetensors_library(tmp_path_factory: pytest.TempPathFactory, sharded: bool):
    path = tiny_model("qwen3-biases-tied", tmp_path_factory.getbasetemp() / "tiny", sharded=sharded)
    theirs, ours = hf_tensors(path), open_safetensors(path)
    assert set(ours.names()) == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours.read_rows(name, 0, len(expected)), expected)
        np.testing.assert_array_equal(ours.read_rows(name, 3, 5), expected[3:5])
    opened(path).check(specs_by_hand(read_config(path)))


def test_only_the_bytes_of_the_rows_are_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    import os

    counts: list[int] = []
    read = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(read(descriptor, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    spec = spec_of("layers.0.qkv.weight")
    opened(checkpoint).read(spec, (slice(1, 2), *whole(spec)[1:]))
    assert sum(counts) == spec.nbytes // TINY.kv_heads


def test_legitimately_unused_tensors(checkpoint: Path):
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)

    resave(checkpoint, add)
    opened(checkpoint).check(specs_by_hand(TINY))


def test_missing_unused_and_misshapen_are_reported_together(checkpoint: Path):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.sinks"] = np.ones(2, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((4, 5), np.float32)

    resave(checkpoint, spoil)
    message = complaint(checkpoint)
    assert "tensor model.norm.weight is missing (needed for norm.scale)" in message
    assert f"{checkpoint / SINGLE}: tensor model.layers.0.self_attn.sinks is used by no parameter" in message
    assert "up_proj.weight has shape (4, 5), the configuration asks for (5, 4)" in message


def test_at_most_ten_problems_are_listed(checkpoint: Path):
    specs = [ParamSpec(f"layers.0.extra{i}.weight", (1,), "float32", (None,)) for i in range(14)]
    message = complaint(checkpoint, specs_by_hand(TINY) + specs)
    assert message.count("has no entry in the weight table") == 10
    assert "and 4 more" in message


def test_unmapped_parameter(checkpoint: Path):
    spec = ParamSpec("layers.0.router.weight", (1,), "float32", (None,))
    assert "layers.0.router.weight has no entry" in complaint(checkpoint, [*specs_by_hand(TINY), spec])
    with pytest.raises(CheckpointError, match="router"):
        opened(checkpoint).read(spec, (slice(None),))


def test_unsupported_type_is_named(checkpoint: Path):
    resave(checkpoint, lambda t: t.update({"model.norm.weight": np.ones(4, np.float64)}))
    assert "tensor model.norm.weight is F64; supported types: F32, F16, BF16" in complaint(checkpoint)


def shard(directory: Path) -> tuple[Path, Path, dict[str, str]]:
    """Spread the checkpoint over two files with an index."""
    tensors, files = (
        tensors_of(TINY),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    )
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, directory / file)
    placed = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    write_index(directory, placed)
    (directory / SINGLE).unlink(missing_ok=True)
    return directory / files[0], directory / files[1], placed


def write_index(directory: Path, placed: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def test_shards(tmp_path: Path):
    shard(tmp_path)
    opened(tmp_path).check(specs_by_hand(TINY))


def test_a_tensor_in_two_files(tmp_path: Path):
    first, second, placed = shard(tmp_path)
    tensors = tensors_of(TINY)
    name = next(name for name, file in placed.items() if file == first.name)
    save_file({n: tensors[n] for n, file in placed.items() if file == second.name or n == name}, second)
    assert f"{second}: tensor {name} is also in {first.name}" in complaint(tmp_path)


def test_a_shard_is_missing(tmp_path: Path):
    first, _, _ = shard(tmp_path)
    first.unlink()
    assert f"{first} cannot be read: No such file" in complaint(tmp_path)


def test_index_and_files_disagree(tmp_path: Path):
    first, _, placed = shard(tmp_path)
    name = next(name for name, file in placed.items() if file == first.name)
    write_index(tmp_path, {**{n: f for n, f in placed.items() if n != name}, "ghost": first.name})
    message = complaint(tmp_path)
    assert f"{first}: holds tensor {name}, which the index does not place there" in message
    assert f"{first.name}: tensor ghost, promised by the index, is missing" in message


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ([], "empty or no object"),
        ({"a": "../b.safetensors"}, "no plain file name"),
        ({"a": 3}, "no plain file name"),
    ],
)
def test_bad_index(tmp_path: Path, placed: object, message: str):
    write_index(tmp_path, placed)
    assert message in complaint(tmp_path)


def test_index_that_is_no_json(tmp_path: Path):
    (tmp_path / INDEX).write_text("<html>")
    assert "is no index of safetensors" in complaint(tmp_path)


def header(tmp_path: Path, entries: object, data: bytes = b"", length: int | None = None) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return tmp_path


def entry(dtype: str = "F32", shape: object = (2,), begin: int = 0, end: int = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        (b"{nonsense", b"", "the header is malformed"),
        (b"[]", b"", "the header is malformed: no object"),
        (b'{"a": 1, "a": 1}', b"", "a is there twice"),
        ({"a": 1}, b"", "entry for a is malformed"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "entry for a is malformed"),
        ({"a": entry(dtype="Q7")}, b"12345678", "'Q7'"),
        ({"a": entry(end=4)}, b"1234", "a (F32 [2]) cannot lie in bytes 0 to 4"),
        ({"a": entry(shape=(-2,))}, b"12345678", "cannot lie"),
        ({"a": entry(begin=8, end=16)}, b"1" * 16, "cannot lie in bytes 8 to 16, after 0"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, b"1" * 12, "b (F32 [2]) cannot lie in bytes 4 to 12, after 8"),
        ({"a": entry()}, b"1234", "is truncated"),
        ({"a": entry()}, b"1" * 20, "is too long"),
    ],
)  # fmt: skip
def test_bad_headers(tmp_path: Path, entries: object, data: bytes, message: str):
    found = complaint(header(tmp_path, entries, data))
    assert message in found
    assert str(tmp_path / SINGLE) in found


def test_header_longer_than_the_file(tmp_path: Path):
    assert "truncated or no safetensors file" in complaint(header(tmp_path, {}, length=10**12))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_file_without_a_header(tmp_path: Path, content: bytes):
    (tmp_path / SINGLE).write_bytes(content)
    assert "truncated or no safetensors file" in complaint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(checkpoint: Path):
    source = SafetensorsSource([checkpoint / SINGLE])
    (checkpoint / SINGLE).write_bytes(b"gone")
    with pytest.raises(CheckpointError, match="became shorter"):
        source.read_rows("model.norm.weight", 0, 4)


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = complaint(tmp_path)
    assert "pickles only" in message
    assert f"python -c 'import sys, transformers" in message  # noqa: F541
    assert f"{tmp_path} {tmp_path.name}-safetensors" in message


def test_no_weights_at_all(tmp_path: Path):
    assert "neither model.safetensors nor" in complaint(tmp_path)
