"""The prefix cache on disk, and over the restart of an engine."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.engine.conftest import ids, request, run
from tests.support.few_programs import few_programs
from tests.support.untrained import loud, untrained_model
from xlane.engine import EngineConfig, PlanError, prefix_file
from xlane.engine.build import Built, build
from xlane.engine.engine import Engine
from xlane.engine.pages import PageAllocator
from xlane.engine.prefix_file import UnusableFile
from xlane.models.opened import open_model

PAGE_BYTES = 24
KEYS = [bytes([number]) * 16 for number in range(5)]
PAGES = np.arange(5 * PAGE_BYTES, dtype=np.uint8).reshape(5, PAGE_BYTES)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "below" / "cache"
    prefix_file.write(path, "me", PAGE_BYTES, KEYS, iter([PAGES[:3], PAGES[3:]]))
    return path


def test_what_was_written_is_read(written: Path) -> None:
    keys, pages = prefix_file.read(written, "me", PAGE_BYTES, 9)
    assert keys == KEYS
    np.testing.assert_array_equal(pages, PAGES)
    assert [path.name for path in written.parent.iterdir()] == ["cache"]


def test_of_more_than_fit_the_last_used_are_read(written: Path) -> None:
    keys, pages = prefix_file.read(written, "me", PAGE_BYTES, 2)
    assert keys == KEYS[3:]
    np.testing.assert_array_equal(pages, PAGES[3:])


def test_it_is_a_safetensors_file(written: Path) -> None:
    with safe_open(written, framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("pages"), PAGES)
        assert [row.tobytes() for row in file.get_tensor("keys")] == KEYS
        assert file.metadata()["identity"] == "me"


def test_another_identity_and_another_form_are_refused(written: Path) -> None:
    with pytest.raises(UnusableFile, match="another model"):
        prefix_file.read(written, "you", PAGE_BYTES, 9)
    with pytest.raises(UnusableFile, match="header"):
        prefix_file.read(written, "me", PAGE_BYTES + 1, 9)


def test_keys_that_were_made_otherwise_are_refused(written: Path) -> None:
    written.write_bytes(written.read_bytes().replace(b"prefix cache 3", b"prefix cache 2"))
    with pytest.raises(UnusableFile, match="not as this version writes it"):
        prefix_file.read(written, "me", PAGE_BYTES, 9)


def test_no_damage_goes_unseen(written: Path) -> None:
    """Whichever byte is another, or how much is missing: an error, or, where a page is not read, the same pages."""
    whole = written.read_bytes()
    for at in range(len(whole)):
        written.write_bytes(whole[:at] + bytes([whole[at] ^ 0x21]) + whole[at + 1 :])
        with pytest.raises(UnusableFile):
            prefix_file.read(written, "me", PAGE_BYTES, 9)
    for length in range(0, len(whole), 7):
        written.write_bytes(whole[:length])
        with pytest.raises(UnusableFile):
            prefix_file.read(written, "me", PAGE_BYTES, 9)


def test_a_write_that_fails_leaves_what_was_there(written: Path) -> None:
    def broken():
        yield PAGES[:1]
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        prefix_file.write(written, "me", PAGE_BYTES, KEYS[:2], broken())
    assert prefix_file.read(written, "me", PAGE_BYTES, 9)[0] == KEYS
    assert [path.name for path in written.parent.iterdir()] == ["cache"]


def test_the_allocator_tells_what_it_remembers_least_recently_used_first() -> None:
    pages = PageAllocator(6)
    taken = pages.take(4) or []
    for page, key in zip(taken, KEYS):
        pages.remember(page, key)
    pages.give_back(taken[:2])  # the second is forgotten before the first
    pages.give_back([taken[3]])
    order = [taken[1], taken[0], taken[3], taken[2]]
    assert pages.known() == [(page, KEYS[taken.index(page)]) for page in order]


PROMPT = [3, 3, 7, 0, 11, 18, 5, 5, 5, 1, 12, 9, 3, 16, 2, 2, 8, 14]


class Lives:
    """One model's engines, one after another, over the same compiled programs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cache"
        model = untrained_model(folder / "model", num_hidden_layers=1)
        self.config = EngineConfig(
            model_id="m", kernels="xla", lanes=2, page_tokens=4, max_total_tokens=48, prefill_chunk_tokens=16,
            prefix_cache_path=str(self.path),
        )  # fmt: skip
        self.model = open_model(model, weights=False).config
        with few_programs():
            built = build(self.config, self.model, None)
        self.built = replace(built, params=loud(built.params))

    def start(self, built: Built | None = None, sha: str | None = None, **changes) -> Engine:
        return Engine(replace(self.config, **changes), self.model, built or self.built, sha)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return Lives(tmp_path_factory.mktemp("lives"))


@pytest.fixture
def lives(made: Lives) -> Lives:
    made.path.unlink(missing_ok=True)
    return made


def ask(engine: Engine, prompt: list[int], **changes) -> tuple[list[int], int]:
    """The output, and how much of the prompt was found."""
    (outputs,) = run(engine, replace(request(prompt), **changes))
    return ids(outputs), outputs[0].cached_tokens


def one_life(engine: Engine, *prompts: list[int], **changes) -> list[tuple[list[int], int]]:
    answers = [ask(engine, prompt, **changes) for prompt in prompts]
    engine.drain(1.0)
    engine.stop()
    engine.stop()  # twice is once
    return answers


def test_a_restarted_engine_finds_what_the_last_one_computed(lives: Lives) -> None:
    ((first, found),) = one_life(lives.start(prefix_cache_path=None), PROMPT)
    assert found == 0
    assert not lives.path.exists()
    assert one_life(lives.start(), PROMPT) == [(first, 0)]
    # Four full pages of the prompt's eighteen tokens; then the tokens that were generated, too.
    assert one_life(lives.start(), PROMPT) == [(first, 16)]
    longer = [*PROMPT, *first[:5]]
    (again,) = one_life(lives.start(), longer)
    assert again[1] == 20
    assert again[0][:3] == first[5:8]
    (salted,) = one_life(lives.start(), PROMPT, cache_salt="mine")
    assert salted == (first, 0)
    assert one_life(lives.start(), PROMPT, cache_salt="mine") == [(first, 16)]
    assert one_life(lives.start(), PROMPT) == [(first, 16)]


def test_the_file_is_bounded_and_what_was_used_last_is_kept(lives: Lives) -> None:
    page_bytes = 2 * 2 * 16 * 4 * 4
    other = PROMPT[::-1]
    one_life(lives.start(prefix_cache_bytes=5 * page_bytes), other, PROMPT)
    assert 5 * page_bytes < lives.path.stat().st_size < 6 * page_bytes + 1024
    found = [found for _, found in one_life(lives.start(), PROMPT, other)]
    assert found[0] == 16
    assert found[1] < 16
    lives.path.unlink()
    one_life(lives.start(prefix_cache_bytes=1), PROMPT)
    assert not lives.path.exists()


@pytest.mark.parametrize("change", ["weights", "sha", "damage"])
def test_what_does_not_belong_here_is_left_alone(
    lives: Lives, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    one_life(lives.start(), PROMPT)
    built, sha = lives.built, None
    if change == "weights":
        built = replace(built, params=tuple(p if p.ndim < 2 else -p for p in built.params))
    elif change == "sha":
        sha = "0123"
    else:
        content = bytearray(lives.path.read_bytes())
        content[len(content) // 2] ^= 1
        lives.path.write_bytes(content)
    before = lives.path.read_bytes()
    with caplog.at_level(logging.WARNING):
        engine = lives.start(built, sha)
    assert f"the prefix cache in {lives.path} is not used" in caplog.text
    assert lives.path.read_bytes() == before
    assert one_life(engine, PROMPT)[0][1] == 0


def test_a_path_that_cannot_be_written_loses_the_cache_and_nothing_else(
    lives: Lives, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    ((_, found),) = one_life(lives.start(prefix_cache_path=str(tmp_path / "file" / "cache")), PROMPT)
    assert found == 0
    assert "cannot be written" in caplog.text


def test_a_group_of_processes_refuses_it_by_name(lives: Lives) -> None:
    with pytest.raises(PlanError, match="--prefix-cache-path"):
        lives.start(processes=2)
