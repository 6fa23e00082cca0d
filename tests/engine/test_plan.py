"""Bounds on time by hand, and what `describe` says of chips that are not here."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.chips.facts import SHAPES
from tests.support.in_bits import Stored, in_bits, in_fp8
from tests.support.tiny import tiny_model
from tests.support.untrained import VOCAB, untrained_model
from xlane.engine import EngineConfig, PlanError
from xlane.engine.build import design, load_weights
from xlane.engine.identity import depends_on
from xlane.engine.opening import open_served
from xlane.engine.plan import describe
from xlane.engine.roofline import Roofline
from xlane.models.decoder import DecoderGraph
from xlane.models.registry import config_from_hf

READ, FLOPS = 1e12, 1e15


def roofline(hf: dict, **mesh: int) -> Roofline:
    config = config_from_hf(hf)
    return Roofline(
        config=config, specs=DecoderGraph.of(config, "bfloat16", packed=False).specs, kv_dtype="bfloat16",
        kv_rows=None, read_bytes_per_s=READ, flops_per_s=FLOPS, **{"split": 1, "copies": 1, **mesh},
    )  # fmt: skip


LAYER = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
WEIGHTS = 32 * (LAYER + 2 * 4096) + 4096 + 128256 * 4096
"""Llama 3.1 8B without its table of embeddings, of which a step reads a few rows."""
KV_TOKEN_BYTES = 32 * 2 * 8 * 128 * 2


@pytest.fixture(scope="module")
def llama() -> dict:
    return SHAPES["8b"] | {"num_hidden_layers": 32}


def test_a_step_reads_all_weights_and_what_the_lanes_hold(llama: dict):
    model = roofline(llama)
    assert model.decode_s(1, 0) == pytest.approx(2 * WEIGHTS / READ)
    assert model.decode_s(64, 1000) == pytest.approx((2 * WEIGHTS + 64_000 * KV_TOKEN_BYTES) / READ)


def test_many_rows_are_bound_by_arithmetic(llama: dict):
    matrices = 32 * LAYER + 128256 * 4096
    assert roofline(llama).decode_s(4096, 0) == pytest.approx(2 * matrices * 4096 / FLOPS)
    attention = 32 * 2 * 2 * 32 * 128 * 2048 * 2048 / 2
    assert roofline(llama).prefill_s(2048) == pytest.approx(
        (2 * 32 * LAYER * 2048 + 2 * 128256 * 4096 + attention) / FLOPS
    )


def test_devices_share_a_copy_and_copies_share_the_rows(llama: dict):
    one = roofline(llama)
    assert roofline(llama, split=8).decode_s(64, 1000) == pytest.approx(one.decode_s(64, 1000) / 8)
    assert roofline(llama, copies=4).decode_s(64, 1000) == pytest.approx(one.decode_s(16, 1000))


def test_a_tied_table_is_read_as_the_head():
    tied = roofline(SHAPES["1b"] | {"num_hidden_layers": 16})
    layer = 2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 8192 + 2 * 2048
    assert tied.decode_s(1, 0) == pytest.approx(2 * (16 * layer + 2048 + 128256 * 2048) / READ)


def test_of_experts_a_step_reads_those_its_rows_choose():
    mixtral = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "max_position_embeddings": 64, "vocab_size": 100, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False, "sliding_window": None,
    }  # fmt: skip
    model = roofline(mixtral)
    one = 2 * 3 * 64 * 96 / READ
    rest = model.decode_s(1, 0) - 2 * one
    assert rest == pytest.approx(2 * (64 * (64 + 64) + 64 * 64 + 8 * 64 + 3 * 64 + 100 * 64) / READ)
    assert model.decode_s(3, 0) == pytest.approx(rest + 6 * one)
    assert model.decode_s(9, 0) == pytest.approx(rest + 8 * one)
    # Four copies share one set of experts: all eight are met, and each device holds two.
    assert roofline(mixtral, copies=4).decode_s(8, 0) == pytest.approx(rest + 2 * one)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_model(tmp_path_factory.mktemp("model"))


def test_a_topology_is_described_by_its_data_sheet(model: Path):
    told = describe(EngineConfig(model_id="m", model_parallel=2, lanes=2, page_tokens=4), model, "v6e-8")
    assert (told["device"], told["devices"], told["dtype"]) == ("v6e-8", 2, "bfloat16")
    assert told["memory bytes"] == 2 * int(0.9 * 32 * 2**30)
    assert (told["memory GB/s of a device"], told["bfloat16 TFLOP/s of a device"]) == (1640, 918)
    assert (told["KV cache tokens"], told["KV page tokens"]) == (2 * 64, 4)
    assert told["held tokens a lane"] == 64
    weights = VOCAB * 32 + 2 * (2 * 32 + 32 * 8 * 16 + 64 * 32 + 3 * 32 * 48) + 32
    held = 64 * 2 * 2 * 2 * 16
    # Told in ms to the microsecond, and this model needs less: what is said is that it is no time at all.
    assert 2 * (weights + held) / 2 / 1640e9 < 0.5e-6
    assert told["step ms of 1 lane at least"] == 0.0
    assert told["prompt tokens per s at most"] > 10**6


@pytest.mark.parametrize(
    ("topology", "message"), [("v9-1", "no topology v9-1"), ("h200-3", "after h200- comes one of 1, 2, 4, 8")]
)
def test_an_unknown_topology_is_refused(model: Path, topology: str, message: str):
    with pytest.raises(PlanError, match=message):
        describe(EngineConfig(model_id="m"), model, topology)


def test_the_device_at_hand_is_measured_and_its_programs_checked(model: Path):
    config = EngineConfig(
        model_id="m", kernels="xla", lanes=2, page_tokens=4, prefill_chunk_tokens=16, model_parallel=1
    )
    told = describe(config, model, compiled=True)
    assert told["device"] == "cpu (cpu)"
    assert told["programs"] == "decode[2], mixed[2+16] compiled and checked"
    assert told["temporaries bytes"] > 0
    assert told["memory GB/s of a device"] > 0.1
    assert told["TFLOP/s of a device"] > 0.0005
    assert describe(config, model, "h200")["programs"].startswith("4, not compiled (--compile): decode[1], ")


GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True}


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "gptq"])
def test_what_is_planned_warmed_and_filled_at_random_is_what_is_served(
    method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of FP8, what is in full is known of the tensors alone."""
    plain = tiny_model("qwen3", tmp_path_factory.getbasetemp() / "tiny")
    if method == "gptq":
        rng = np.random.default_rng(0)

        def store(shape: tuple[int, int], module: str):
            stored = Stored(rng, shape, 8, 32, True)
            return stored, stored.gptq(1)

        few, _ = in_bits(plain, tmp_path, GPTQ, store)
    else:
        group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
        said = {"fp8": {}, "compressed-tensors": {"format": "float-quantized", "config_groups": {"0": group}}}
        few, _ = in_fp8(
            plain,
            tmp_path,
            {"quant_method": method, **said[method]},
            "_scale",
            leave="lm_head|layers.0.*down",
        )
    config = EngineConfig(model_id="m", kernels="xla", dtype="float32", lanes=2, page_tokens=4)
    served = open_served(config, few)
    blueprint = design(config, served.config)[0]
    params = load_weights(config, blueprint, served.source, lambda *_: None)
    held_bytes = sum(array.nbytes for array in jax.tree.leaves(params))
    assert describe(config, few, "v6e-1")["weights bytes"] == held_bytes
    for opened in (
        open_served(config, few, weights=False),
        open_served(replace(config, load_format="dummy"), few),
    ):
        assert opened.source is None
        assert depends_on(design(config, opened.config)[0], "") == depends_on(blueprint, "")
