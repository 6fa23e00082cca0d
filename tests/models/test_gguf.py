"""GGUF tensors and configuration: against the gguf package's own reading, and files that must be refused."""

import json
import re
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.support.tiny import tiny_model
from xlane.models.config import YarnRope
from xlane.models.decoder import DecoderGraph
from xlane.models.errors import CheckpointError, UnsupportedModel
from xlane.models.gguf import READABLE, GgufFile, GgufTensors, config_from_gguf
from xlane.models.gguf_architectures import ARCHITECTURES, PHIMOE_MSCALE
from xlane.models.gguf_config import _longrope
from xlane.models.gguf_metadata import Metadata
from xlane.models.gguf_weights import GGUF_IGNORED, GGUF_WEIGHTS
from xlane.models.opened import open_model
from xlane.models.registry import config_from_hf
from xlane.models.weights import Weights

from . import gguf_writing as tiny
from .gguf_converted import converted, permuted

K_PROJ = "blk.1.attn_k.weight"


def read_all(tensors: GgufTensors, name: str) -> np.ndarray:
    return tensors.read_rows(name, 0, tensors.shape(name)[0])


@pytest.fixture(scope="module")
def reader(demo_gguf: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(demo_gguf)


def test_the_demo_is_what_ggufs_own_reader_reads(demo_gguf: Path, reader: gguf.GGUFReader):
    file = GgufFile(demo_gguf)
    own = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata == own
    tensors, theirs = GgufTensors(file), {tensor.name: tensor for tensor in reader.tensors}
    assert len(list(tensors.names())) == len(theirs) == 272
    for name in (
        "token_embd.weight",
        "blk.29.ffn_down.weight",
        "blk.7.attn_v.weight",
        "blk.3.attn_norm.weight",
        "output_norm.weight",
    ):
        expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        assert tensors.shape(name) == expected.shape
        np.testing.assert_array_equal(read_all(tensors, name), expected)
    for part, heads in (("q", 9), ("k", 3)):
        stored = theirs[f"blk.5.attn_{part}.weight"]
        ours = read_all(tensors, f"blk.5.attn_{part}.weight")
        expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
        np.testing.assert_array_equal(permuted(ours, heads), expected)


def test_the_demo_is_opened_and_dequantised_in_time(demo_gguf: Path):
    # A third of a second and one second on two quiet cores; the bounds are for a busy machine.
    began = time.perf_counter()
    tensors = GgufTensors(GgufFile(demo_gguf))
    assert time.perf_counter() - began < 5
    for name in tensors.names():
        assert read_all(tensors, name).dtype == tensors.dtype(name) == np.float32
    assert time.perf_counter() - began < 30


def test_the_demo_configures_a_model(demo_gguf: Path):
    raw = config_from_gguf(GgufFile(demo_gguf))
    assert json.loads(json.dumps(raw)) == raw
    config = config_from_hf(raw)
    assert (config.family, config.vocab_size, config.hidden_size, config.layers) == ("llama", 49152, 576, 30)
    assert (config.heads, config.kv_heads, config.head_dim, config.ffn_size) == (9, 3, 64, 1536)
    assert (config.max_positions, config.norm_eps, config.rope_theta) == (8192, 1e-5, 100000.0)
    assert config.tied_embeddings
    assert (config.bos_id, config.eos_ids) == (1, (2, 0))  # the end of a turn, and by its name that of a text


@pytest.mark.parametrize("kind", READABLE)
def test_every_storage_type_reads_as_the_package_dequantises(tmp_path: Path, kind: str):
    how, values = Type[kind], tiny.weights()
    tensors = GgufTensors(GgufFile(tiny.write(tmp_path / "m.gguf", kind=how)))
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight", "blk.1.ffn_down.weight"):
        expected = gguf.quants.dequantize(tiny.stored(values[name], how), how)
        whole = read_all(tensors, name)
        assert whole.dtype == np.float32
        assert whole.flags.writeable
        np.testing.assert_array_equal(whole, expected)
        np.testing.assert_array_equal(tensors.read_rows(name, 7, 20), expected[7:20])
        assert tensors.read_rows(name, 5, 5).shape == (0, expected.shape[1])


@pytest.mark.parametrize(
    ("arch", "reorders"), [("llama", True), ("smollm3", True), ("qwen2", False), ("qwen3", False)]
)
def test_rows_of_queries_and_keys_are_in_hugging_faces_order(tmp_path: Path, arch: str, reorders: bool):
    values = tiny.weights()
    bias = np.arange(tiny.KV_HEADS * tiny.HEAD_DIM, dtype=np.float32)
    q, k = values["blk.1.attn_q.weight"], values["blk.1.attn_k.weight"]
    kept = {**values, "blk.1.attn_k.bias": bias}
    if reorders:
        kept["blk.1.attn_q.weight"] = permuted(q, tiny.HEADS)
        kept["blk.1.attn_k.weight"] = permuted(k, tiny.KV_HEADS)
        kept["blk.1.attn_k.bias"] = permuted(bias, tiny.KV_HEADS)
    tensors = GgufTensors(GgufFile(tiny.write(tmp_path / "m.gguf", arch, tensors=kept)))
    np.testing.assert_array_equal(read_all(tensors, "blk.1.attn_q.weight"), q)
    np.testing.assert_array_equal(tensors.read_rows(K_PROJ, 30, 70), k[30:70])
    np.testing.assert_array_equal(read_all(tensors, K_PROJ.replace("weight", "bias")), bias)
    np.testing.assert_array_equal(read_all(tensors, "blk.1.attn_v.weight"), values["blk.1.attn_v.weight"])


@pytest.mark.parametrize("arch", ["llama", "smollm3", "qwen2", "qwen3"])
def test_every_architecture_configures_a_model(tmp_path: Path, arch: str):
    keys = {
        "tokenizer.ggml.eot_token_id": 5,
        f"{arch}.attention.key_length": 32,
        f"{arch}.attention.value_length": 32,
    }
    head = {"output.weight": np.ones((tiny.V, tiny.D), np.float32)}
    config = config_from_hf(
        config_from_gguf(GgufFile(tiny.write(tmp_path / "m.gguf", arch, keys, tiny.weights() | head)))
    )
    assert config.family == arch
    assert (config.vocab_size, config.head_dim, config.eos_ids) == (tiny.V, 32, (2, 5))
    assert not config.tied_embeddings
    assert config.qkv_bias == (arch == "qwen2")
    assert config.qk_norm == ("head" if arch == "qwen3" else None)
    assert config.window is None


CONVERTED = {
    "llama-biases": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe-gguf": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3-gguf": "smollm3",
    "gemma": "gemma",
    "gemma2-gguf": "gemma2",
    "gemma3-gguf": "gemma3",
    "phi": "phi2",
    "phi3": "phi3",
    "phi3-longrope": "phi3",
    "phimoe-gguf": "phimoe",
    "stablelm": "stablelm",
    "stablelm-parallel": "stablelm",
    "granite": "granite",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "cohere": "command-r",
    "cohere2-gguf": "cohere2",
    "starcoder2-gguf": "starcoder2",
    "gpt_bigcode": "starcoder",
    "gpt_neox-serial": "gptneox",
    "falcon-7b": "falcon",
    "falcon-40b": "falcon",
    "gpt2": "gpt2",
    "bloom": "bloom",
    "mpt": "mpt",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3-gguf": "deepseek2",
}
"""Tiny models, and what llama.cpp calls their architectures. `-gguf`: of a form that its files can have."""


@pytest.mark.parametrize("kind", CONVERTED)
def test_what_was_converted_is_the_same_network_with_the_same_weights(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    path = tiny_model(kind, tmp_path_factory.getbasetemp() / "tiny")
    before = open_model(path)
    after = open_model(converted(path, CONVERTED[kind], tmp_path / "m.gguf"))
    assert after.config == before.config
    specs = DecoderGraph.of(before.config, "float32").specs
    assert before.source is not None
    assert after.source is not None
    for source in (before.source, after.source):
        source.check(specs)
    for spec in specs:
        index = tuple(slice(0, size) for size in spec.shape)
        # Adding 1 to a norm's scale and taking it off again rounds twice.
        ours, theirs = after.source.read(spec, index), before.source.read(spec, index)
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=2e-7 * spec.path.endswith("scale"), err_msg=spec.path
        )
        part = (slice(0, 1), *(slice(size // 2, size) for size in spec.shape[1:]))
        np.testing.assert_array_equal(after.source.read(spec, part), ours[part], err_msg=spec.path)


def test_every_architecture_is_converted():
    assert set(CONVERTED.values()) == set(ARCHITECTURES)


def test_smollm3_skips_positions_in_every_fourth_layer(tmp_path: Path):
    path = tiny.write(tmp_path / "m.gguf", "smollm3", {"smollm3.block_count": 8})
    config = config_from_hf(config_from_gguf(GgufFile(path)))
    assert [config.layer_rotates(layer) for layer in range(8)] == [True, True, True, False] * 2


def test_a_window_makes_it_mistral(tmp_path: Path):
    path = tiny.write(tmp_path / "m.gguf", keys={"llama.attention.sliding_window": 128})
    config = config_from_hf(config_from_gguf(GgufFile(path)))
    assert (config.family, config.window) == ("mistral", 128)


def llama3_factors(factor: float, theta: float = 10000.0) -> np.ndarray:
    """Llama 3.1's rule, one frequency at a time."""
    out: list[float] = []
    for pair in range(tiny.HEAD_DIM // 2):
        wavelength = 2 * np.pi * theta ** (2 * pair / tiny.HEAD_DIM)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama3_rope_is_recognised_by_its_effect(tmp_path: Path):
    tensors = tiny.weights() | {"rope_freqs.weight": llama3_factors(32.0)}
    file = GgufFile(tiny.write(tmp_path / "m.gguf", tensors=tensors))
    scaling = config_from_hf(config_from_gguf(file)).rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (32.0, 1.0, 4.0)
    assert scaling.original_max_position == 8192
    open_model(file.path).source.check(
        DecoderGraph.of(config_from_hf(config_from_gguf(file)), "float32").specs
    )


def test_another_rescaling_of_frequencies_is_refused(tmp_path: Path):
    tensors = tiny.weights() | {"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}
    file = GgufFile(tiny.write(tmp_path / "m.gguf", tensors=tensors))
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        config_from_gguf(file)


def test_rope_scalings_are_kept_or_refused(tmp_path: Path):
    def config(kind: str, **more: int):
        keys = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
        keys |= {f"llama.rope.scaling.{key}": value for key, value in more.items()}
        return config_from_hf(config_from_gguf(GgufFile(tiny.write(tmp_path / f"{kind}.gguf", keys=keys))))

    assert config("linear", original_context_length=128).rope_linear_factor == 4.0
    yarn = config("yarn", original_context_length=128).rope_scaling
    assert isinstance(yarn, YarnRope)
    assert (yarn.factor, yarn.original_max_position) == (4.0, 128)
    unnamed = config("yarn").rope_scaling
    assert isinstance(unnamed, YarnRope)
    assert unnamed.original_max_position == 512
    with pytest.raises(UnsupportedModel, match="short_factor is missing"):
        config("longrope")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"llama.attn_logit_softcapping": 30.0}, r"llama\.attn_logit_softcapping"),
        ({"llama.expert_count": 8}, r"llama\.expert_used_count is missing"),
        (
            {"llama.rope.scaling.yarn_ext_factor": 0.5, "llama.rope.scaling.type": "yarn"},
            r"yarn_ext_factor = 0\.5",
        ),
        ({"llama.attention.value_length": 32}, r"llama\.attention\.value_length"),
        ({"llama.rope.dimension_count": 32}, r"llama\.rope\.dimension_count"),
        ({"llama.feed_forward_length": [512, 256]}, r"llama\.feed_forward_length"),
        ({"llama.block_count": "two"}, r"llama\.block_count = 'two'"),
        ({"llama.context_length": None}, r"llama\.context_length is missing"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_key(tmp_path: Path, keys: dict[str, object], named: str):
    path = tiny.write(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(UnsupportedModel, match=named):
        config_from_gguf(GgufFile(path))


def test_another_architecture_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UnsupportedModel, match=r"'rwkv7'.*llama, mpt"):
        config_from_gguf(GgufFile(tiny.write(tmp_path / "m.gguf", "rwkv7")))


def test_another_storage_type_is_refused_by_name_and_tensor(tmp_path: Path):
    path = tiny.write(tmp_path / "m.gguf", kind=Type.NVFP4)
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor token_embd\.weight is stored as NVFP4"):
        GgufTensors(GgufFile(path))


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path):
    path = tiny.write(
        tmp_path / "m.gguf", tensors=tiny.weights() | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    )
    opened = open_model(path)
    assert opened.source is not None
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_sinks\.weight is used by no parameter"):
        opened.source.check(DecoderGraph.of(opened.config, "float32").specs)


def test_a_missing_tensor_is_named(tmp_path: Path):
    tensors = GgufTensors(GgufFile(tiny.write(tmp_path / "m.gguf")))
    assert tensors.where("output_norm.weight").endswith("m.gguf")
    with pytest.raises(CheckpointError, match=r"output\.weight is missing"):
        tensors.shape("output.weight")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    whole = tiny.write(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    # The writer pads the end, so the last few bytes belong to no tensor.
    for size in [0, 3, 4, 8, 20, *range(24, 3000, 61), len(whole) // 2, len(whole) - 4096]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufTensors(GgufFile(cut))


@pytest.mark.parametrize(
    ("start", "content", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, b"\x09\x00\x00\x00", "version 9"),
        (4, b"\x00\x00\x00\x03", "big-endian"),
        (8, b"\xff" * 8, "dimensions"),
        (16, b"\xff" * 8, "truncated or corrupt"),
        (24, b"\xff" * 8, "truncated or corrupt"),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path: Path, start: int, content: bytes, message: str):
    data = bytearray(tiny.write(tmp_path / "m.gguf").read_bytes())
    data[start : start + len(content)] = content
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"bad\.gguf: .*{message}"):
        GgufFile(tmp_path / "bad.gguf")


def test_random_corruption_is_an_error_of_ours_or_none(tmp_path: Path):
    whole = tiny.write(tmp_path / "m.gguf", keys={"tokenizer.ggml.tokens": ["a", "b"]}).read_bytes()
    random, bad = np.random.default_rng(0), tmp_path / "bad.gguf"
    for _ in range(200):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(0, 2500, 3)] = random.integers(0, 256, 3)
        bad.write_bytes(data.tobytes())
        try:
            file = GgufFile(bad)
            config_from_gguf(file)
            GgufTensors(file)
        except (CheckpointError, UnsupportedModel):
            pass


def test_a_missing_file_and_a_part_of_one_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        GgufFile(tmp_path / "none.gguf")
    path = tiny.write(tmp_path / "m.gguf", keys={"split.count": 3})
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        GgufFile(path)


@pytest.mark.parametrize(("written", "whole"), [(0.878249, 1.0), (1.138629, 1.138629), (1.5, 1.5)])
def test_what_takes_some_of_yarn_s_factor_back_is_told_from_the_factor(
    tmp_path: Path, written: float, whole: float
):
    """Converters write either under one key; yarn makes 1.1386 of a factor of 4."""
    keys = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 64,
        "qwen3.rope.scaling.yarn_attn_factor": written,
    }
    scaling = config_from_hf(
        config_from_gguf(GgufFile(tiny.write(tmp_path / "m.gguf", "qwen3", keys)))
    ).rope_scaling
    assert isinstance(scaling, YarnRope)
    assert scaling.attention_factor == pytest.approx(whole, abs=1e-5)


def test_experts_with_tensors_of_their_own_are_read(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """As Mixtral's files had them until April 2024."""
    path = tiny_model("mixtral", tmp_path_factory.getbasetemp() / "tiny")
    tensors = GgufTensors(GgufFile(converted(path, "llama", tmp_path / "new.gguf")))

    class Older:
        """The same with a tensor for each expert."""

        names_of = staticmethod(lambda name: [name.replace("_exps", f".{e}") for e in range(4)])

        def names(self) -> list[str]:
            return [
                one
                for name in tensors.names()
                for one in (self.names_of(name) if "_exps" in name else [name])
            ]

        def _entry(self, name: str) -> tuple[str, int | None]:
            match = re.search(r"ffn_(gate|up|down)\.(\d+)\.", name)
            return (name.replace(match[0], f"ffn_{match[1]}_exps."), int(match[2])) if match else (name, None)

        def shape(self, name: str) -> tuple[int, ...]:
            whole, expert = self._entry(name)
            return tensors.shape(whole) if expert is None else tensors.shape(whole)[1:]

        def where(self, name: str) -> str:
            return name

        def dtype(self, name: str) -> np.dtype:
            return tensors.dtype(self._entry(name)[0])

        def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
            whole, expert = self._entry(name)
            if expert is None:
                return tensors.read_rows(whole, start, stop)
            return tensors.read_rows(whole, expert, expert + 1)[0][start:stop]

    specs = DecoderGraph.of(open_model(path).config, "float32").specs
    new, old = (Weights(source, GGUF_WEIGHTS, GGUF_IGNORED) for source in (tensors, Older()))
    for source in (new, old):
        source.check(specs)
    for spec in specs:
        index = tuple(slice(0, size) for size in spec.shape)
        np.testing.assert_array_equal(old.read(spec, index), new.read(spec, index), err_msg=spec.path)


@pytest.mark.parametrize(
    ("gating", "experts", "groups"), [(2, 256, (8, 4)), (2, 64, (1, 1)), (1, 160, (8, 3)), (1, 64, (1, 1))]
)
def test_groups_of_experts_that_older_files_do_not_name(
    gating: int,
    experts: int,
    groups: tuple[int, int],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
):
    path = tiny_model("deepseek_v2", tmp_path_factory.getbasetemp() / "tiny")
    file = GgufFile(converted(path, "deepseek2", tmp_path / "m.gguf"))
    file.metadata |= {"deepseek2.expert_gating_func": gating, "deepseek2.expert_count": experts}
    for key in ("", "used_"):
        file.metadata.pop(f"deepseek2.expert_group_{key}count", None)
    raw = config_from_gguf(file)
    assert (raw["n_group"], raw["topk_group"]) == groups


@pytest.mark.parametrize(("architecture", "mscale"), [("phi3", None), ("phimoe", PHIMOE_MSCALE)])
def test_phi_moe_keeps_the_scale_that_was_chosen_for_it(
    architecture: str, mscale: float | None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    path = tiny_model("phi3-longrope", tmp_path_factory.getbasetemp() / "tiny")
    read = Metadata(GgufFile(converted(path, "phi3", tmp_path / "m.gguf")), "phi3")
    width = open_model(path).config.rotary_dim or open_model(path).config.head_dim
    assert _longrope(read, ARCHITECTURES[architecture], width, 64).get("short_mscale") == mscale
