"""One program text on meshes of 1x1, 1x2, 1x4 and 2x2 simulated devices: the same tokens, and no needless traffic."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.conftest import ids, request, run
from tests.support.tiny import hf_greedy, tiny_model
from xlane.engine import EngineConfig, PlanError, Request
from xlane.engine.build import design
from xlane.engine.hlo import collectives, moves
from xlane.engine.programs import Programs, compile_all
from xlane.engine.request import MAX_LOGIT_BIAS
from xlane.engine.state import abstract_kv, abstract_state, held_bytes
from xlane.engine.turn import Size
from xlane.models.opened import open_model

pytestmark = pytest.mark.slow

SPLIT_VOCAB, WHOLE_VOCAB = "llama-mha-even-vocab", "qwen3-window-mha"
PROMPTS = [
    np.random.default_rng(seed).integers(3, 131, size).tolist()
    for seed, size in enumerate((5, 40, 1, 17, 33))
]


def _asked() -> list[Request]:
    """More than there are lanes, greedy and sampled side by side, with every kind of cut and penalty somewhere."""
    greedy = [request(prompt, max_tokens=10) for prompt in PROMPTS]
    bias = {"logit_bias": tuple((token, 3.0) for token in range(3, 131, 9))}
    cuts = [
        {"top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.02, **bias},
        {"typical_p": 0.9},
        {"repetition_penalty": 1.3},
    ]
    sampled = [
        request(prompt, max_tokens=10, temperature=0.8, seed=seed, frequency_penalty=0.2 * seed, **cut)
        for seed, (prompt, cut) in enumerate(zip(PROMPTS, cuts))
    ]
    return [one for pair in zip(greedy, sampled) for one in pair]


@pytest.mark.parametrize(
    ("kind", "data", "model"),
    [
        (SPLIT_VOCAB, 1, 4),
        (SPLIT_VOCAB, 2, 2),
        (WHOLE_VOCAB, 1, 2),
        ("mixtral", 2, 2),
        ("cohere", 1, 4),  # which has two kv heads, and norms of each
    ],
)
def test_tokens_do_not_depend_on_the_mesh(engine_of, models: Path, kind: str, data: int, model: int):
    single = engine_of(kind, prefill_chunk_tokens=8)
    meshed = engine_of(kind, prefill_chunk_tokens=8, data_parallel=data, model_parallel=model)
    assert (single.info.device_count, meshed.info.device_count) == (1, data * model)
    expected = [ids(output) for output in run(single, *_asked())]
    assert [ids(output) for output in run(meshed, *_asked())] == expected
    path = tiny_model(kind, models)
    assert expected[::2] == [hf_greedy(path, prompt, 10) for prompt in PROMPTS]
    assert meshed.stats().compiles_after_ready == 0


def test_logprobs_do_not_depend_on_the_mesh(engine_of):
    """`top` and `take_along_axis` meet a vocabulary in pieces."""

    def told(**mesh: int) -> list[tuple[int, ...]]:
        asked = request(PROMPTS[3], max_tokens=4, logprobs=True, top_logprobs=5)
        (output,) = run(engine_of(SPLIT_VOCAB, prefill_chunk_tokens=8, **mesh), asked)
        tokens = [token for step in output for token in step.tokens]
        assert all(token.logprob == pytest.approx(token.top[0][1], abs=1e-6) for token in tokens)
        return [tuple(top for top, _ in token.top) for token in tokens]

    assert told(model_parallel=4) == told()


@pytest.fixture(scope="session")
def programs_of(models: Path):
    """The decode program of all lanes and the longest prefill, compiled for a mesh."""
    compiled: dict[tuple, Programs] = {}

    def make(kind: str, data: int, model: int) -> Programs:
        if (kind, data, model) not in compiled:
            opened = open_model(tiny_model(kind, models), weights=False)
            blueprint, _, _ = design(_config(data_parallel=data, model_parallel=model), opened.config)
            looked_at = replace(blueprint, sizes=(Size(4, 0), Size(0, 32)))
            compiled[kind, data, model] = compile_all(looked_at)
        return compiled[kind, data, model]

    return make


def _config(**options) -> EngineConfig:
    options = {"lanes": 4, "page_tokens": 4, "max_total_tokens": 96, "prefill_chunk_tokens": 32, **options}
    return EngineConfig(model_id="tiny", kernels="xla", **options)


@pytest.mark.parametrize("kind", [SPLIT_VOCAB, WHOLE_VOCAB])
def test_a_split_model_adds_up_twice_a_layer_and_gathers_nothing(programs_of, kind: str):
    programs = programs_of(kind, 1, 2)
    config = programs.blueprint.config
    for name, tokens in (("decode[4]", 4), ("prefill[32]", 32)):
        found = collectives(programs[name].as_text())
        always = [one for one in found if "/cond/branch_1_fun" not in one.where]
        assert {one.kind for one in always} == {"all-reduce"}
        in_layers = [one for one in always if "_run_layer" in one.where]
        assert [one.elements for one in in_layers] == [tokens * config.hidden_size] * 2 * config.layers
        # The embedding's rows; then the likeliest token: its logit, its id.
        rest = sorted(one.elements for one in always if one not in in_layers)
        assert rest == ([4, 4, tokens * config.hidden_size] if kind == SPLIT_VOCAB else [])
        # What is looked for in dozens of passes is looked for in whole rows. Only a scored prompt, which has a pass a
        # block of tokens, brings the rows together in each.
        passes = [one for one in found if "/while/" in one.where]
        assert passes == [] if name.startswith("decode") else 1 <= len(passes) <= 2
        assert all(one.where.count("/while/") == 1 for one in passes)


@pytest.mark.parametrize(("data", "model"), [(1, 1), (1, 2), (1, 4), (2, 2)])
def test_the_pool_stays_where_it_is(programs_of, data: int, model: int):
    """Every byte of KV and state is written in place; what travels is never larger than the logits, or than the biases of
    the rows, of which this model has more than tokens."""
    programs = programs_of(SPLIT_VOCAB, data, model)
    b = programs.blueprint
    kv = abstract_kv(b.config, b.shapes, b.dtype, b.placement)
    state = abstract_state(b.shapes, b.placement)
    pool_shard = kv[0].k.sharding.shard_shape(kv[0].k.shape)
    for name, rows in (("decode[4]", 4), ("prefill[32]", 32)):
        compiled = programs[name]
        held = held_bytes((kv, state)) // b.placement.mesh.size
        assert compiled.memory_analysis().alias_size_in_bytes == held
        text = compiled.as_text()
        shape = f"[{','.join(map(str, pool_shard))}]"
        assert [line for line in moves(text, math.prod(pool_shard)) if shape in line] == []
        most = max((one.elements for one in collectives(text)), default=0)
        assert most <= rows * max(b.config.vocab_size, MAX_LOGIT_BIAS)


def test_memory_counts_what_each_device_holds(models: Path):
    model = open_model(tiny_model(SPLIT_VOCAB, models), weights=False).config
    plans = {mesh: design(_config(data_parallel=mesh[0], model_parallel=mesh[1]), model)[1] for mesh in
             ((1, 1), (1, 4), (2, 1))}  # fmt: skip
    assert plans[2, 1].weights_bytes == 2 * plans[1, 1].weights_bytes
    assert plans[2, 1].kv_bytes == 2 * plans[1, 1].kv_bytes
    assert plans[1, 4].kv_bytes == plans[1, 1].kv_bytes
    # All but the norms' scales is split.
    assert plans[1, 1].weights_bytes < plans[1, 4].weights_bytes < 1.02 * plans[1, 1].weights_bytes


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama-gqa-tied", {"model_parallel": 8}, r"kv_heads=2 .* over 8 devices: lower --num-shard"),
        (SPLIT_VOCAB, {"model_parallel": 16}, r"needs 16 devices, but there are 8"),
        (SPLIT_VOCAB, {"data_parallel": 3, "model_parallel": 1}, r"4 lanes .* over data_parallel=3"),
    ],
)
def test_what_cannot_be_split_is_refused(models: Path, kind: str, options: dict, message: str):
    model = open_model(tiny_model(kind, models), weights=False).config
    with pytest.raises(PlanError, match=message):
        design(_config(**options), model)
