"""The checker finds what it is for, in real compiled programs, and nothing where nothing is wrong."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests.support.untrained import VOCAB, untrained_model
from xlane.engine import EngineConfig
from xlane.engine.audit import faults
from xlane.engine.build import design
from xlane.engine.hlo import aliases, moves, sorts
from xlane.engine.programs import Programs, compile_all
from xlane.engine.turn import Size
from xlane.models.opened import open_model

SQUARE = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def text_of(function, *, donate: bool = False) -> str:
    return jax.jit(function, donate_argnums=(0,) if donate else ()).lower(SQUARE).compile().as_text()


def test_a_copy_is_found_where_an_argument_must_not_be_changed():
    def write(x):
        return x.at[3].set(1.0)

    assert len(moves(text_of(write), 64 * 64)) == 1
    assert moves(text_of(write), 64 * 64 + 1) == []
    assert moves(text_of(write, donate=True), 64 * 64) == []


def test_arguments_that_become_results_are_counted():
    assert (aliases(text_of(lambda x: x + 1)), aliases(text_of(lambda x: x + 1, donate=True))) == (0, 1)


def test_every_kind_of_sort_is_found():
    assert sorts(text_of(lambda x: jnp.sort(x, axis=0)), 64 * 64)
    assert sorts(text_of(lambda x: jnp.argsort(x, axis=0)), 64 * 64)
    assert sorts(text_of(lambda x: jax.lax.top_k(x, 3)[0]), 64 * 64)
    assert sorts(text_of(lambda x: jnp.sort(x, axis=0)), 64 * 64 + 1) == []
    assert sorts(text_of(lambda x: x.max(axis=0)), 1) == []


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Split over two devices; the pool is larger than anything a launch computes."""
    path = untrained_model(
        tmp_path_factory.mktemp("untrained"),
        num_hidden_layers=1,
        vocab_size=VOCAB + 1,
        max_position_embeddings=4096,
    )
    config = EngineConfig(
        model_id="m",
        kernels="xla",
        lanes=4,
        page_tokens=4,
        max_total_tokens=4096,
        prefill_chunk_tokens=16,
        model_parallel=2,
    )
    blueprint = design(config, open_model(path, weights=False).config)[0]
    return compile_all(replace(blueprint, sizes=(Size(4, 0), Size(0, 16), Size(4, 16))))


def test_sound_programs_have_no_faults(programs: Programs):
    assert faults(programs) == []


POOL = "f32[1,4096,4,16]"
"""A device's part of the pool: one head, and four lanes of 1024 pages of four tokens."""


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (f"  %copy.1 = {POOL}{{3,2,1,0}} copy(%p)", "moves a layer's KV"),
        (
            f"  %t.1 = {POOL.replace('1,4096', '4096,1')}{{3,2,1,0}} transpose(%p), dimensions={{1,0,2,3}}",
            "moves a layer's KV",
        ),
        ("  %sort.1 = f32[4,20]{1,0} sort(%x), dimensions={1}", "sorts"),
        ('  %g = f32[4,32]{1,0} all-gather(%x), metadata={op_name="jit(d)/_run_layer/dot"}', "all-gather of 128 elements in a layer"),
        ('  %r = f32[4,32]{1,0} all-reduce(%x), metadata={op_name="jit(d)/_run_layer/dot"}', "layers add up 384 elements between devices, and 256 are meant"),
        ('  %g = f32[40,20]{1,0} all-gather(%x), metadata={op_name="jit(d)/head"}', "all-gather of 800 elements in jit(d)/head"),
    ],
)  # fmt: skip
def test_one_wrong_line_is_one_fault(programs: Programs, line: str, fault: str):
    wrong = SimpleNamespace(as_text=lambda: f"{programs['decode[4]'].as_text()}\n{line}")
    (found,) = faults(Programs(programs.blueprint, {"decode[4]": wrong}, programs.infos[:1]))
    assert found.startswith(f"decode[4]: {fault}")


def test_state_that_is_not_given_back_is_a_fault(programs: Programs):
    text = programs["decode[4]"].as_text().replace("may-alias", "", 1)
    wrong = SimpleNamespace(as_text=lambda: text)
    (found,) = faults(Programs(programs.blueprint, {"decode[4]": wrong}, programs.infos[:1]))
    assert "arrays of KV and state are updated in place" in found
