"""The engine's own programs, compiled for chips that are not here: nothing is copied, sorted or sent that need not be.

    .ci/compilers FOLDER && XLANE_COMPILERS=FOLDER pytest -m chips

Each model and topology has a process of its own, because a compiler that was once loaded stays.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.bench.dummy_model import SHAPES
from tests.chips.attention import CASES as CASES_ALONE
from tests.chips.facts import CHUNK_TOKENS, LANES, pool_elements

pytestmark = pytest.mark.chips

COMPILERS = os.environ.get("XLANE_COMPILERS", "")
"""A folder of wheels laid out as in site-packages: an installed plugin would change every other start of jax."""

CASES = [
    ("v6e-1", "8b", 1),
    ("v6e-1", "8b", 1, "int8"),
    ("v5e-1", "1b", 1),
    ("v5e-8", "8b", 1, "int8"),
    ("v6e-8", "8b", 2),
    ("h200", "8b", 2),
    ("h200", "8b", 2, "int8", "int8"),
    ("h200", "1b", 2),
    ("h100-8", "8b", 2),
]

DECODE, PREFILL, MIXED = f"decode[{LANES}]", f"prefill[{CHUNK_TOKENS}]", f"mixed[{LANES}+{CHUNK_TOKENS}]"
ROWS = {DECODE: LANES, PREFILL: CHUNK_TOKENS, MIXED: LANES + CHUNK_TOKENS}


def _environment() -> dict[str, str]:
    dropped = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    path = [COMPILERS, *sys.path] if COMPILERS else sys.path
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "JAX_PLATFORMS": "cpu"}


def run(package: str, module: str, *told: str) -> dict[str, Any]:
    """What a module of this folder prints, with a compiler in the process that it needs."""
    if not COMPILERS and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not here: .ci/compilers FOLDER, then XLANE_COMPILERS=FOLDER")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.chips.{module}", *told],
        env=_environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join((*case[:2], *case[3:])))
def case(request: pytest.FixtureRequest) -> tuple[str, str, int, dict[str, Any]]:
    topology, shape, layers, *bits = request.param
    package = "jax_plugins" if topology.startswith("h") else "libtpu"
    told = run(package, "facts", topology, shape, str(layers), *bits)
    return topology, shape, layers, told | {"bits": bits}


def test_the_checker_finds_nothing(case):
    assert case[3]["faults"] == []
    assert set(case[3]["programs"]) == set(ROWS)


def test_kv_and_state_are_updated_in_place(case):
    topology, shape, layers, told = case
    # int8 has a float32 of 4 bytes for each vector of 128.
    number_bytes = 1 + 4 / 128 if told["kv_dtype"] == "int8" else 2
    held = int(layers * 2 * pool_elements(shape) * number_bytes + told["state_bytes"]) // told["devices"]
    for info in told["programs"].values():
        if topology.startswith("h"):
            assert info["alias_bytes"] == held
        else:  # Small arrays are rounded up to tiles.
            assert held <= info["alias_bytes"] < held + 2**20
        assert info["moves"] == info["scale moves"] == []


def test_nothing_is_sorted(case):
    assert [info["sorts"] for info in case[3]["programs"].values()] == [[]] * len(ROWS)


def test_temporaries_stay_under_the_plan(case):
    told = case[3]
    for info in told["programs"].values():
        assert 0 < info["temp_bytes"] * told["devices"] <= told["planned_temp_bytes"]


def test_a_split_model_adds_up_twice_a_layer(case):
    _, shape, layers, told = case
    for name, info in told["programs"].items():
        found = info["collectives"]
        in_layers = Counter((one["kind"], one["elements"]) for one in found if "_run_layer" in one["where"])
        hidden = ROWS[name] * SHAPES[shape]["hidden_size"]
        assert in_layers == ({} if told["devices"] == 1 else {("all-reduce", hidden): 2 * layers})
        assert bool(found) == (told["devices"] > 1)
        # Sampling looks at whole rows at most, and the embedding's rows come together once.
        most = ROWS[name] * SHAPES[shape]["vocab_size"]
        assert max((one["elements"] for one in found), default=0) <= most


def test_the_kernels_are_there(case):
    """Ours attend, once a layer: lanes by one, prompts by the other."""
    _, _, layers, told = case
    called = {name: Counter(info["kernels"]) for name, info in told["programs"].items()}
    for name, kernel in ((DECODE, "decode"), (PREFILL, "prefill"), (MIXED, "decode"), (MIXED, "prefill")):
        assert called[name][f"xlane_{kernel}_attention"] == layers


def test_few_rows_read_weights_of_8_bits_as_they_are(case):
    """Lanes: four products a layer and the logits. Of a prompt, whose rows are many, only the logits; beside 16 lanes those are
    too many as well."""
    topology, _, layers, told = case
    reads = topology == "h200" and told["bits"][1:] == ["int8"]
    called = {name: Counter(info["kernels"])["xlane_byte_linear"] for name, info in told["programs"].items()}
    assert called == {DECODE: reads * (4 * layers + 1), PREFILL: reads * 1, MIXED: 0}


@pytest.mark.parametrize("topology", ["v5e-1", "v6e-1"])
def test_attention_alone_takes_the_largest_table_and_any_pages_and_int8(topology: str):
    told = run("libtpu", "attention", topology)
    # XLA lays out int8 rows of two tiles in another way between launches than in them: `build.slower` says so.
    copied = [name for name, said in told.items() if said.pop("moves")]
    assert copied == ["int8, heads of 256"]
    wanted = {"refusal": "", "kernels": ["decode", "prefill"], "in place": True}
    assert list(told.values()) == [wanted] * len(CASES_ALONE)
