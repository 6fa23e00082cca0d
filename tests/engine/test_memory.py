"""The memory plan by hand, and what it refuses."""

import re
from dataclasses import replace

import pytest

from tests.support.untrained import KV_BYTES_PER_TOKEN, VOCAB, untrained_model
from xlane.engine import EngineConfig, PlanError
from xlane.engine.build import design
from xlane.engine.kernels import pallas_tpu
from xlane.engine.kernels.pallas_tpu import PallasTpuKernels
from xlane.engine.memory import GIB, Demand, MemoryPlan, machine_bytes, plan_pages
from xlane.models.config import Lora
from xlane.models.opened import open_model
from xlane.tpu.chips import find_topology


def plan(
    limit: int, *, kv_bytes: int | None = None, on_cpu: bool = False, lanes: int = 4, most: int = 100
) -> MemoryPlan:
    """Weights 1000, state 50, temporaries 30, pages of 10 bytes and 8 tokens: one request of 100 tokens needs 13."""
    demand = Demand(weights_bytes=1000, page_bytes=10, page_tokens=8, state_bytes=50, temp_bytes=30)
    config = EngineConfig(model_id="m", kv_bytes=kv_bytes)
    return plan_pages(config, demand, limit, on_cpu, lanes, most)


def test_an_accelerator_gives_the_pool_what_is_left() -> None:
    made = plan(1000 + 50 + 30 + 209)
    assert (made.pages, made.kv_bytes, made.kv_tokens) == (20, 200, 160)
    assert made.total_bytes == 1000 + 200 + 50 + 30
    assert made.total_bytes <= made.limit_bytes
    assert (made.page_tokens, made.lanes, made.max_total_tokens) == (8, 4, 100)


def test_no_more_pages_than_all_lanes_can_use() -> None:
    assert plan(10**9).pages == 4 * 13


def test_kv_bytes_bounds_the_pool_but_not_beyond_what_is_left() -> None:
    assert plan(10**9, kv_bytes=150).pages == 15
    assert plan(1080 + 140, kv_bytes=10**9).pages == 14


def test_a_cpu_gives_a_twelfth_but_at_least_one_request() -> None:
    assert plan(2400, on_cpu=True, lanes=100).pages == 20
    assert plan(1080 + 140, on_cpu=True).pages == 13


def test_one_request_that_does_not_fit_is_refused_with_numbers_and_what_to_lower() -> None:
    with pytest.raises(PlanError, match=r"max_total_tokens=100 needs 0\.00 GiB .* lower --max-total-tokens"):
        plan(1080 + 129)
    demand = Demand(weights_bytes=GIB, page_bytes=2**20, page_tokens=32, state_bytes=0, temp_bytes=0)
    with pytest.raises(PlanError, match=r"weights 1\.00 GiB.*smaller model"):
        plan_pages(EngineConfig(model_id="m"), demand, GIB // 2, False, 1, 4096)


def test_this_machine_has_memory() -> None:
    assert 2**28 < machine_bytes() < 2**50


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return open_model(untrained_model(tmp_path_factory.mktemp("untrained")), weights=False).config


def config(**changes) -> EngineConfig:
    return EngineConfig(**{"model_id": "m", "kernels": "xla", "lanes": 3, "page_tokens": 4, **changes})


def test_design_by_hand(model) -> None:
    blueprint, memory, note = design(config(max_total_tokens=30, prefill_chunk_tokens=64), model)
    embedding = 2 * VOCAB * 32
    layer = 2 * 32 + 32 * (4 + 2 + 2) * 16 + 4 * 16 * 32 + 3 * 32 * 48
    assert memory.weights_bytes == 4 * (embedding + 2 * layer + 32)
    assert memory.pages == 3 * 8
    assert memory.kv_bytes == 3 * 8 * 4 * KV_BYTES_PER_TOKEN
    assert blueprint.shapes == (3, 24, 4, 8, VOCAB, (2, 16))
    # No chunk is longer than the longest request, rounded up.
    names = (
        "decode[1] decode[2] decode[3] mixed[1+4] mixed[2+4] mixed[3+4] mixed[1+8] mixed[3+8] mixed[1+16] "
        "prefill[32] mixed[3+32]"
    )
    assert [size.name for size in blueprint.sizes] == names.split()
    assert blueprint.prefill_segments == 3
    assert note == "xla (asked for)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_total_tokens": 65}, r"max_total_tokens=65 is beyond the model's context of 64 tokens"),
        ({"max_total_tokens": 32, "max_input_tokens": 32}, r"max_input_tokens=32 leaves no room"),
        ({"data_parallel": 2}, r"3 lanes cannot be split over data_parallel=2"),
        ({"model_parallel": 99}, r"a mesh of data=1 x model=99 needs 99 devices"),
        ({"model_parallel": 8}, r"kv_heads=2 of this model cannot be split over 8 devices"),
        ({"kernels": "native", "dtype": "bfloat16"}, r"--kernels native serves one CPU in float32"),
        (
            {"kernels": "pallas"},
            r"--kernels pallas serves GPUs and TPUs, and this is cpu: use --kernels auto",
        ),
        ({"kv_bytes": 1000}, r"max_total_tokens=64 needs .* KV cache"),
        ({"memory_fraction": 0.0}, r"memory 0\.00 GiB"),
    ],
)
def test_what_cannot_work_is_refused_by_name(model, changes: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        design(config(**changes), model)


def test_more_devices_than_kv_heads_have_copies_of_them(model) -> None:
    """Its two over four devices: each has one, so keys and values take twice the memory, and no adapter is read."""
    over_four = config(lanes=4, model_parallel=4)
    blueprint, split, _ = design(over_four, model)
    assert blueprint.shapes.kv_rows == (4, 16)
    one = design(config(lanes=4), model)[1]
    assert split.kv_bytes == 2 * one.kv_bytes
    lora = Lora(names=("a",), digests=("",), slots=1, rank=2, maps=(("qkv", 3),))
    with pytest.raises(PlanError, match=r"--lora-adapters .* the 2 of this model .* over 4 devices"):
        design(over_four, replace(model, lora=lora))


def test_memory_counts_every_copy_on_every_device(model) -> None:
    one = design(config(lanes=4), model)[1]
    two = design(config(lanes=4, data_parallel=2), model)[1]
    assert two.weights_bytes == 2 * one.weights_bytes
    assert two.kv_bytes == 2 * one.kv_bytes
    split = design(config(lanes=4, model_parallel=2), model)[1]
    assert split.kv_bytes == one.kv_bytes
    assert one.weights_bytes < split.weights_bytes < 2 * one.weights_bytes


def test_a_share_of_the_machine_is_the_limit(model) -> None:
    assert design(config(), model)[1].limit_bytes == int(machine_bytes() * 0.9)


def test_a_topology_is_planned_without_its_devices(model) -> None:
    """Eight chips of 32 GiB by the table; the model's two KV heads go over two of them."""
    one_half = {"data_parallel": 4, "model_parallel": 2, "lanes": 8, "dtype": "bfloat16"}
    blueprint, memory, note = design(config(**one_half), model, topology=find_topology("v6e-8"))
    assert memory.limit_bytes == int(32 * GIB * 0.9) * 8
    assert (blueprint.placement.data_size, blueprint.placement.model_size) == (4, 2)
    assert note == "xla (asked for)"
    here = design(config(**one_half), model)[1]
    assert memory.weights_bytes == here.weights_bytes
    assert memory.state_bytes == here.state_bytes
    assert memory.pages == 8 * 16
    assert (
        memory.kv_bytes == memory.pages * 4 * KV_BYTES_PER_TOKEN // 2 * 4
    )  # in bfloat16, once for each part of `data`


@pytest.mark.parametrize(
    ("topology", "dtype", "lanes", "chunk"), [("h200", "bfloat16", 128, 64), ("v5e-1", "bfloat16", 64, 64)]
)
def test_a_topology_has_its_platforms_defaults(
    model, topology: str, dtype: str, lanes: int, chunk: int
) -> None:
    asked = EngineConfig(model_id="m", page_tokens=4, kernels="xla")
    blueprint, memory, _ = design(asked, model, topology=find_topology(topology))
    assert (blueprint.dtype, memory.lanes, blueprint.chunk_tokens) == (dtype, lanes, chunk)


def test_a_topology_too_small_for_the_mesh_is_refused(model) -> None:
    with pytest.raises(PlanError, match=r"a mesh of data=1 x model=2 needs 2 devices, but there are 1"):
        design(config(model_parallel=2), model, topology=find_topology("h200"))


def test_a_tpu_attends_with_its_own_kernel_unless_told_otherwise(model) -> None:
    asked = EngineConfig(model_id="m", page_tokens=16)
    blueprint, _, note = design(asked, model, topology=find_topology("v6e"))
    assert isinstance(blueprint.kernels, PallasTpuKernels)
    assert note == "pallas (attention; XLA's products)"
    # Its two heads of 16 lie in one row of 128, of which they fill a quarter.
    assert blueprint.shapes.kv_rows == (1, 128)
    blueprint, _, note = design(replace(asked, kernels="xla"), model, topology=find_topology("v6e"))
    assert (blueprint.kernels.name, note) == ("xla", "xla (asked for)")


@pytest.mark.parametrize(
    ("context", "lanes", "page_tokens"),
    [
        (64, 64, 128),
        (
            2**17,
            64,
            128,
        ),  # 72 rows, of 64 lanes and 8 pieces of prompts, times 1,024 pages times 4 bytes: 288 KiB
        (2**17, 128, 256),  # 136 rows would be 544 KiB, and 512 fit
        (2**20, 64, 1024),
    ],
)
def test_a_tpus_pages_are_as_large_as_the_longest_context_asks(
    model, context: int, lanes: int, page_tokens: int
) -> None:
    asked = EngineConfig(model_id="m", lanes=lanes)
    model = replace(model, max_positions=context)
    blueprint, memory, note = design(asked, model, topology=find_topology("v6e"))
    assert note == "pallas (attention; XLA's products)"
    assert (memory.page_tokens, blueprint.shapes.page_tokens) == (page_tokens, page_tokens)
    assert blueprint.shapes.table_width * page_tokens == max(context, page_tokens)
    assert design(asked, model, topology=find_topology("h200"))[1].page_tokens == 32


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"page_tokens": 4}, "attention in all programs is XLA's: pages of 4 tokens"),
        ({"kv_dtype": "int8"}, "attention in all programs is XLA's: pages of 16 tokens in int8"),
        # 4 pages of 4 bytes a row, and room for one row.
        (
            {},
            "attention in {mixed} is XLA's: a page table of 2 rows is too large for contexts beyond 32 tokens",
        ),
    ],
)
def test_what_a_kernel_leaves_to_xla_is_told_and_refused_where_it_was_asked_for(
    model, changes, told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pallas_tpu, "MOST_TABLE_BYTES", 16)
    asked = EngineConfig(**{"model_id": "m", "lanes": 1, "page_tokens": 16, **changes})
    blueprint, _, note = design(asked, model, topology=find_topology("v6e"))
    told = told.format(mixed=", ".join(size.name for size in blueprint.sizes if size.rows and size.tokens))
    assert told in note
    with pytest.raises(PlanError, match=f"--kernels pallas: {re.escape(told)}"):
        design(replace(asked, kernels="pallas"), model, topology=find_topology("v6e"))
