"""From a configuration to an engine that runs: what the second start reuses, what is written down, what is told before."""

import gc
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.engine.conftest import ids, request, run
from tests.support.untrained import KV_BYTES_PER_TOKEN, VOCAB, untrained_model
from xlane.engine import EngineConfig, FinishReason, PlanError, programs
from xlane.engine import follow as engine_follow
from xlane.engine.build import design, slower
from xlane.engine.engine import Engine
from xlane.engine.manifest import write_manifest
from xlane.engine.plan import describe
from xlane.engine.programs import Programs
from xlane.engine.start import start, warm
from xlane.engine.step import Blueprint
from xlane.engine.step import step as plain_step
from xlane.engine.turn import Size
from xlane.models.opened import open_model
from xlane.tpu.runtime import use_compile_cache

pytestmark = pytest.mark.slow

PROGRAMS = ["decode[1]", "decode[2]", "mixed[1+4]", "mixed[2+4]", "mixed[1+8]", "mixed[2+8]"]
ONE_LANES_PROGRAMS = ["decode[1]", "mixed[1+4]", "mixed[1+8]"]


class CacheEvents:
    """Counts what jax asked of its persistent cache."""

    def __init__(self) -> None:
        self.hits = self.misses = 0

    def __call__(self, event: str, **kwargs: object) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"

    def taken(self) -> tuple[int, int]:
        """Hits and misses since the last call."""
        taken, self.hits, self.misses = (self.hits, self.misses), 0, 0
        return taken


@pytest.fixture
def events() -> Iterator[CacheEvents]:
    counter = CacheEvents()
    jax.monitoring.register_event_listener(counter)
    yield counter
    jax.monitoring.unregister_event_listener(counter)


@pytest.fixture(autouse=True)
def own_cache() -> Iterator[None]:
    """`start` decides for the whole process; give the other tests their cache back."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_persistent_cache_enable_xla_caches",
        "jax_export_ignore_forward_compatibility",
    )
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests below, as by engines of several models on one machine."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def started() -> Iterator[Callable[..., Engine]]:
    """Start engines, and stop them afterwards."""
    running: list[Engine] = []

    def make(config: EngineConfig, path: Path) -> Engine:
        running.append(start(config, path))
        return running[-1]

    yield make
    for engine in running:
        engine.stop()


def config(cache: Path | None, **changes) -> EngineConfig:
    return EngineConfig(
        **{
            "model_id": "untrained", "load_format": "dummy", "kernels": "xla", "lanes": 2, "page_tokens": 4,
            "max_total_tokens": 24, "prefill_chunk_tokens": 8, "cache_dir": None if cache is None else str(cache),
            **changes,
        }
    )  # fmt: skip


def programs_in(cache: Path) -> set[str]:
    return {
        entry.name
        for entry in (cache / "programs").glob("jit_*-cache")
        if any(kind in entry.name for kind in ("decode", "prefill", "mixed"))
    }


def manifests(cache: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((cache / "manifests").iterdir())]


def test_warm_compiles_what_start_will_need(model: Path, cache: Path, started) -> None:
    told: list[tuple[int, int]] = []
    path = warm(config(cache), model, lambda done, total: told.append((done, total)))
    assert told == [(done, len(PROGRAMS)) for done in range(len(PROGRAMS) + 1)]
    assert path is not None
    warmed = programs_in(cache)
    assert len(warmed) == len(PROGRAMS)
    started(config(cache), model)
    assert programs_in(cache) == warmed


def test_a_second_start_compiles_nothing(model: Path, cache: Path, events: CacheEvents, started) -> None:
    first = started(config(cache), model)
    events.taken()
    asked = [[1, 2, 3], [4] * 17]
    made = [ids(output) for output in run(first, *(request(prompt, max_tokens=5) for prompt in asked))]
    assert [len(tokens) for tokens in made] == [5, 5]
    second = started(config(cache), model)
    hits, misses = events.taken()
    assert (hits >= len(PROGRAMS), misses) == (True, 0)
    assert [
        ids(output) for output in run(second, *(request(prompt, max_tokens=5) for prompt in asked))
    ] == made
    assert first.stats().compiles_after_ready == second.stats().compiles_after_ready == 0


def test_a_second_start_serves_while_most_programs_are_still_loaded(
    model: Path, tmp_path: Path, events: CacheEvents, started, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path, lanes=4, prefill_chunk_tokens=32)

    def answers(engine: Engine) -> list[list[int]]:
        requests = [request(prompt, max_tokens=5) for prompt in ([1, 2, 3], [4] * 17, [5], [6, 7])]
        return [ids(output) for output in run(engine, *requests)]

    first = started(asked, model)
    made = answers(first)
    may, loaded, load = threading.Event(), list[str](), programs._load

    def late(blueprint: Blueprint, size: Size, kept: object) -> object:
        assert may.wait(60)
        loaded.append(size.name)
        return load(blueprint, size, kept)

    monkeypatch.setattr(programs, "_load", late)
    events.taken()
    second = started(asked, model)
    assert second.info.programs == first.info.programs
    assert answers(second) == made
    assert not loaded
    may.set()
    second.wait_loaded()
    assert answers(second) == made
    at_once = {"decode[1]", "decode[4]", "prefill[32]", "mixed[4+32]"}
    assert {*loaded} == {info.name for info in second.info.programs} - at_once != set()
    assert events.taken()[1] == second.stats().compiles_after_ready == 0


def test_programs_that_the_cache_lost_are_all_compiled_before_anybody_is_served(
    model: Path, tmp_path: Path, started, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm(config(tmp_path), model)
    shutil.rmtree(tmp_path / "programs")
    compilation_cache.reset_cache()
    monkeypatch.setattr(programs, "_load", lambda *args: pytest.fail("nothing may come later"))
    engine = started(config(tmp_path), model)
    assert len(programs_in(tmp_path)) == len(engine.info.programs) > 4


def test_a_second_start_traces_nothing(
    model: Path, tmp_path: Path, started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But it does where a text is damaged, where the code is another, and where another model is served."""
    traced: list[str] = []

    def step(blueprint, size, *args):
        traced.append(size.name)
        return plain_step(blueprint, size, *args)

    monkeypatch.setattr(programs, "step", step)

    def start_again(path: Path = model) -> list[str]:
        traced.clear()
        engine = started(config(tmp_path, lanes=1), path)
        engine.wait_loaded()
        (output,) = run(engine, request([1, 2, 3], max_tokens=5))
        assert len(ids(output)) == 5
        return sorted(set(traced))

    assert start_again() == ONE_LANES_PROGRAMS
    assert start_again() == []
    (text,) = (tmp_path / "traced").glob("*decode[[]1]*")
    whole = text.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no text"):
        text.write_bytes(damaged)
        assert start_again() == ["decode[1]"]
        assert start_again() == []
    assert start_again(untrained_model(tmp_path / "other", num_hidden_layers=2)) == ONE_LANES_PROGRAMS
    monkeypatch.setattr("xlane.engine.traced.source_digest", lambda: "another")
    assert start_again() == ONE_LANES_PROGRAMS
    assert not list((tmp_path / "traced").glob("*.tmp"))


def test_the_manifest_lists_every_program_with_its_bytes(model: Path, cache: Path, started) -> None:
    engine = started(config(cache), model)
    (manifest,) = [one for one in manifests(cache) if one["shapes"]["vocab"] == VOCAB]
    assert manifest["model_id"] == "untrained"
    assert manifest["jax"] == jax.__version__
    assert (manifest["dtype"], manifest["kernels"], manifest["mesh"]) == (
        "float32",
        "xla",
        {"data": 1, "model": 1},
    )
    sizes = {"lanes": 2, "pages": 12, "page_tokens": 4, "table_width": 6, "vocab": VOCAB}
    assert manifest["shapes"] == sizes | {"kv_rows": [2, 16]}
    assert [program["name"] for program in manifest["programs"]] == PROGRAMS
    for told, info in zip(manifest["programs"], engine.info.programs):
        assert told["alias_bytes"] == info.alias_bytes > 12 * 4 * KV_BYTES_PER_TOKEN / 2
        assert told["flops"] > 0
    assert not list((cache / "manifests").glob("*.tmp"))


def test_options_that_change_the_programs_have_their_own_manifest(model: Path, tmp_path: Path) -> None:
    """Also those that change no shape of the state."""
    names = set()
    for changes in ({}, {}, {"prefill_chunk_tokens": 16}, {"page_tokens": 8}, {"dtype": "bfloat16"}):
        asked = config(tmp_path, **changes)
        blueprint, _, _ = design(asked, open_model(model, weights=False).config)
        names.add(write_manifest(asked, Programs(blueprint, {}, ()), jax.__version__))
    assert len(names) == 4


def test_a_cache_may_be_moved(model: Path, cache: Path, tmp_path: Path, events: CacheEvents, started) -> None:
    """Warmed on one machine, mounted under another path on the next."""
    started(config(cache), model).stop()
    shutil.copytree(cache, tmp_path / "elsewhere")
    compilation_cache.reset_cache()
    events.taken()
    started(config(tmp_path / "elsewhere"), model)
    assert events.taken()[1] == 0


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_what_a_killed_start_left_half_written_is_compiled_again(
    model: Path, cache: Path, tmp_path: Path, started
) -> None:
    first = started(config(cache), model)
    shutil.copytree(cache, tmp_path / "half")
    for path in (tmp_path / "half" / "programs").glob("jit_*decode*-cache"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    compilation_cache.reset_cache()
    second = started(config(tmp_path / "half"), model)
    (made, again) = (ids(run(engine, request([1, 2, 3]))[0]) for engine in (first, second))
    assert made == again


def test_models_and_options_share_a_cache_without_meeting(
    model: Path, cache: Path, tmp_path: Path, events: CacheEvents, started
) -> None:
    other_model = untrained_model(tmp_path / "other", num_hidden_layers=1, vocab_size=23, rope_theta=500.0)
    expected = ids(run(started(config(cache), model), request([1, 2, 3]))[0])
    started(config(cache, lanes=1, page_tokens=8), other_model)
    events.taken()
    again = started(config(cache), model)
    assert events.taken()[1] == 0
    assert again.info.vocab_size == VOCAB
    assert ids(run(again, request([1, 2, 3]))[0]) == expected
    assert {one["shapes"]["vocab"] for one in manifests(cache)} == {VOCAB, 23}


def test_without_a_cache_directory_nothing_is_written(
    model: Path, cache: Path, started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        engine_follow, "use_compile_cache", lambda directory: use_compile_cache(cache / "programs")
    )
    started(config(None), model)
    assert warm(config(None), model) is None
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_serves_but_cannot_be_warmed(
    model: Path, cache: Path, tmp_path: Path, started
) -> None:
    (tmp_path / "programs").symlink_to(cache / "programs")
    (tmp_path / "manifests").write_text("no directory")
    engine = started(config(tmp_path), model)
    assert engine.healthy()
    with pytest.raises(OSError, match="manifests"):
        warm(config(tmp_path), model)


def test_a_cache_that_cannot_be_made_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(
        PlanError, match=r"--cache-dir .*/file cannot be written.*choose another one, or none"
    ):
        start(config(tmp_path / "file"), model)


def test_an_engine_stops_twice_and_then_takes_nothing(model: Path, cache: Path, started) -> None:
    engine = started(config(cache), model)
    (output,) = run(engine, request([5], max_tokens=2))
    assert output[-1].finish_reason is FinishReason.LENGTH
    engine.stop()
    engine.stop()
    assert not engine.healthy()


def test_describe_tells_without_compiling(model: Path, events: CacheEvents) -> None:
    told = describe(config(None), model)
    layer = 2 * 32 + 32 * 8 * 16 + 64 * 32 + 3 * 32 * 48
    assert told["parameters"] == 2 * VOCAB * 32 + layer + 32
    assert told["weights bytes"] == 4 * told["parameters"]
    assert told["KV cache bytes per token"] == KV_BYTES_PER_TOKEN / 2
    assert (told["lanes"], told["KV cache tokens"], told["max total tokens"]) == (2, 48, 24)
    assert (told["family"], told["layers"], told["context tokens"]) == ("llama", 1, 64)
    # What measures this machine's ceilings is all that is compiled: fewer than there are programs.
    assert told["programs"] == f"{len(PROGRAMS)}, not compiled (--compile): {', '.join(PROGRAMS)}"
    assert sum(events.taken()) < len(PROGRAMS)


def test_describe_counts_weights_in_few_bits(model: Path) -> None:
    told = describe(config(None, quantize="int8"), model)
    outputs = 2 * VOCAB + 8 * 16 + 32 + 2 * 48 + 32
    norms = 3 * 32
    assert told["weights bytes"] == (told["parameters"] - norms) + 4 * outputs + 4 * norms
    assert (told["dtype"], told["quantize"]) == ("float32", "int8")


def test_a_start_warns_of_options_that_cost_speed(model: Path) -> None:
    opened = open_model(model, weights=False)
    blueprint = design(config(None, quantize="int4"), opened.config)[0]
    assert "weights in int4" in slower(blueprint)
    assert slower(design(config(None), opened.config)[0]) == ""
    tpu = replace(blueprint, quantize=None, placement=SimpleNamespace(device=SimpleNamespace(platform="tpu")))
    for width, kv_dtype, told in ((256, "int8", True), (128, "int8", False), (256, "bfloat16", False)):
        shaped = replace(tpu, kv_dtype=kv_dtype, shapes=tpu.shapes._replace(kv_rows=(2, width)))
        assert ("copies a layer's pools" in slower(shaped)) == told


def test_what_cannot_work_is_refused_before_anything_is_compiled(
    model: Path, cache: Path, events: CacheEvents
) -> None:
    with pytest.raises(PlanError, match="max_total_tokens=1000"):
        start(config(cache, max_total_tokens=1000), model)
    assert events.taken() == (0, 0)
