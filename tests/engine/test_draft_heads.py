"""Draft heads: what they learn, the file they are in, and that their guesses never change a text."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.conftest import ids, run
from tests.engine.test_guesses import JSON, TEXT, WAYS, asked, same
from tests.support.few_programs import few_programs
from tests.support.guided import MODEL_VOCAB
from tests.support.untrained import untrained_model
from xlane.engine import EngineConfig
from xlane.engine.build import build, design, load_weights
from xlane.engine.engine import Engine
from xlane.engine.errors import PlanError
from xlane.engine.heads import fingerprint
from xlane.engine.own_text import Dialogue, write_texts
from xlane.engine.step import Blueprint, Params
from xlane.engine.train_draft import Course, Judged, Trainer, read_texts
from xlane.models.attention import XlaKernels
from xlane.models.checkpoint import SINGLE
from xlane.models.draft_heads import Heads, open_heads, save_heads
from xlane.models.errors import CheckpointError
from xlane.models.guidance import guidance_tokenizer
from xlane.models.opened import open_model

pytestmark = pytest.mark.slow

OPTIONS = {"lanes": 2, "page_tokens": 4, "max_total_tokens": 200, "prefill_chunk_tokens": 16}
CONFIG = EngineConfig(model_id="m", kernels="xla", **OPTIONS)
PROMPT = [5, 60, 7]
DIALOGUE = Dialogue((1,), (4, 5), (2,))


def sure(blueprint: Blueprint, params: Params) -> Params:
    """Dummy weights of the decoder scaled up until it knows what it wants to say, and says the like again and again."""
    specs = blueprint.graph.specs
    scales = [100 if spec.path == "head.weight" else 12 if len(spec.shape) > 1 else 1 for spec in specs]
    scaled = (jnp.multiply(p, s) for p, s in zip(params, scales))  # type: ignore[arg-type]
    return (*scaled, *params[len(specs) :])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_model(
        tmp_path_factory.mktemp("heads"), vocab_size=MODEL_VOCAB, max_position_embeddings=256
    )


@pytest.fixture(scope="module")
def trained(
    model: Path, engine_of: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Judged, Judged, Heads, Path]:
    """How heads do, on text like what they learn, before and after a little training; the heads, and the folder they are in."""
    blueprint, _, _ = design(CONFIG, open_model(model, weights=False).config)
    params = sure(blueprint, load_weights(CONFIG, blueprint, None, lambda *state: None))
    done: list[tuple[int, int]] = []
    own = write_texts(engine_of(), DIALOGUE, 1500, lambda *state: done.append(state))
    texts = asyncio.run(own)
    assert done[-1] == (1500, 1500)
    assert all(
        text.tokens[0] == 1 and tuple(text.tokens[text.given - 2 : text.given]) == (4, 5) for text in texts
    )
    thoughts = read_texts(blueprint, params, texts * 4, lambda done, total: None)
    assert thoughts.own.tolist() == [
        place >= text.given for text in texts * 4 for place in range(len(text.tokens))
    ]
    # What is given before an answer is no place to guess at, nor one from which too little follows.
    assert len(thoughts.starts(3)) == 4 * sum(max(0, len(text.tokens) - text.given - 2) for text in texts)
    trainer = Trainer(blueprint, params, thoughts, Course(epochs=20))
    before = trainer.judge()
    steps = [step for step, _ in trainer.train()]
    assert steps == [*range(1, trainer.steps + 1)]
    folder = tmp_path_factory.mktemp("file") / "made"
    save_heads(folder, trainer.heads, fingerprint(blueprint.graph.specs, None), "m")
    return before, trainer.judge(), trainer.heads, folder


@pytest.fixture(scope="module")
def engine_of(model: Path) -> Iterator[Callable[..., Engine]]:
    built: dict[tuple, Engine] = {}

    def make(**options) -> Engine:
        key = tuple(sorted(options.items()))
        if key not in built:
            config = replace(CONFIG, **options)
            opened = open_model(model, weights=False)
            with few_programs():
                made = build(config, opened.config, None)
            made = replace(made, params=sure(made.programs.blueprint, made.params))
            built[key] = Engine(
                config, opened.config, made, guidance=lambda: guidance_tokenizer(TEXT, MODEL_VOCAB)
            )
        return built[key]

    yield make
    for engine in built.values():
        assert engine.stats().compiles_after_ready == 0
        engine.stop()


def test_training_makes_guesses_better(trained: tuple[Judged, Judged, Heads, Path]) -> None:
    before, after, *_ = trained
    assert after.loss < 0.9 * before.loss
    assert 1 <= before.tokens_per_step < after.tokens_per_step <= 4


def test_what_is_judged_is_what_is_guessed(trained: tuple[Judged, Judged, Heads, Path]) -> None:
    """By hand: each head adds its block to the state it got, and its token is looked up for the next one."""
    heads, rng = trained[2], np.random.default_rng(1)
    table, hidden = rng.normal(size=(MODEL_VOCAB, 32)), rng.normal(size=(2, 32))
    guessed, sure = heads.guess(
        jnp.array(hidden, jnp.float32),
        jnp.array([3, 4]),
        lambda t: jnp.array(table, jnp.float32)[t],
        heads.blocks[0].up.shape[0],  # type: ignore[union-attr]
        0.5,
        XlaKernels("cpu"),
    )

    def normed(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean())

    for row, token in enumerate((3, 4)):
        state, likely = hidden[row], 1.0
        for ahead, block in enumerate(heads.blocks):
            inner = np.asarray(block.up) @ np.concatenate([normed(state), normed(table[token])])
            state = state + np.asarray(block.down) @ (inner / (1 + np.exp(-inner)))
            chances = np.exp(0.5 * np.asarray(heads.rows) @ state)
            token = int(heads.tokens[np.argmax(chances)])
            likely *= chances.max() / chances.sum()
            assert int(guessed[row, ahead]) == token
            assert float(sure[row, ahead]) == pytest.approx(likely, rel=1e-4)


def test_a_file_gives_back_what_was_written(
    trained: tuple[Judged, Judged, Heads, Path], tmp_path: Path
) -> None:
    heads, folder = trained[2:]
    for path in (folder, folder / SINGLE):
        opened = open_heads(path)
        assert (opened.made_for, opened.model_id) == ("dummy", "m")
        np.testing.assert_array_equal(opened.tokens, heads.tokens)
        assert (opened.shape.count, opened.shape.hidden) == (3, 32)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(
        (folder / SINGLE).read_bytes().replace(b"xlane-draft-heads.1", b"xlane-draft-heads.0")
    )
    with pytest.raises(CheckpointError, match="holds no draft heads of this version"):
        open_heads(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_heads(tmp_path / "nothing")


def test_heads_of_another_model_are_refused_by_name(
    trained: tuple[Judged, Judged, Heads, Path], model: Path, tmp_path: Path
) -> None:
    """By what an engine begins with: nothing has to be compiled for it."""
    heads, folder = trained[2:]

    def begin(draft_model: Path, speculate: int) -> None:
        config = replace(CONFIG, speculate=speculate, draft_model=str(draft_model))
        blueprint, _, _ = design(config, open_model(model, weights=False).config)
        load_weights(config, blueprint, None, lambda *state: None)

    begin(folder, 3)
    save_heads(tmp_path / "like", heads, "another", "org/like")
    with pytest.raises(PlanError, match="was made for org/like, and not for the weights of m"):
        begin(tmp_path / "like", 3)
    wide = heads._replace(rows=jnp.ones((len(heads.tokens), 64)))
    blocks = tuple(b._replace(up=jnp.ones((128, 128)), down=jnp.ones((64, 128))) for b in heads.blocks)
    save_heads(tmp_path / "wide", wide._replace(blocks=blocks), "dummy", "org/wide")
    with pytest.raises(PlanError, match="was made for org/wide"):
        begin(tmp_path / "wide", 3)
    with pytest.raises(PlanError, match="guesses nothing without --speculate"):
        begin(folder, 0)


def test_texts_are_the_same_with_heads_as_without(
    trained: tuple[Judged, Judged, Heads, Path], engine_of: Callable[..., Engine]
) -> None:
    """Greedy and sampled, scored, stopped and penalised, and with a grammar, all beside each other."""
    plain, guessing = engine_of(), engine_of(speculate=3, draft_model=str(trained[3]))
    ways = [*WAYS.values(), {"stop_ids": TEXT.eos_ids, "temperature": 1.0}]
    grammars = [None] * len(WAYS) + [JSON]
    crowd = [asked(how, [5 + n, 60, 7], grammar) for n, (how, grammar) in enumerate(zip(ways, grammars))]
    for one, two in zip(run(plain, *crowd), run(guessing, *crowd), strict=True):
        same(one, two)
    assert 0 < guessing.stats().accepted.sum <= guessing.stats().guessed_tokens


def test_heads_guess_where_nothing_was_said_before(
    trained: tuple[Judged, Judged, Heads, Path], engine_of: Callable[..., Engine]
) -> None:
    """No two tokens of the text occur twice in a row, so there is nothing to look up."""
    engine = engine_of(speculate=3, draft_model=str(trained[3]))
    before = engine.stats().guessed_tokens
    (output,) = run(engine, asked({"max_tokens": 5}, PROMPT))
    assert len({*pairwise([*PROMPT, *ids(output)][:5])}) == 4
    assert engine.stats().guessed_tokens - before >= 3


def test_heads_that_are_sure_of_nothing_offer_nothing(
    trained: tuple[Judged, Judged, Heads, Path], engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    """Rows of zeros find every token as likely: three guesses in a row are right once in a long while."""
    heads = trained[2]
    flat = heads._replace(rows=jnp.zeros_like(heads.rows))  # type: ignore[arg-type]
    save_heads(tmp_path / "flat", flat, "dummy", "m")
    engine = engine_of(speculate=3, draft_model=str(tmp_path / "flat"))
    (output,) = run(engine, asked({"max_tokens": 5}, PROMPT))
    assert len(ids(output)) == 5
    assert engine.stats().guessed_tokens == 0
