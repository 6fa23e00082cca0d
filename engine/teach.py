"""From a model's files to a file of draft heads: texts are written or given, read, learnt from, and the heads kept.

Knows the order of these; how each is done is in `own_text` and `train_draft`. No text, only token ids.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..models.draft_heads import save_heads
from ..models.opened import OpenedModel, open_model
from .build import build, design, load_weights
from .config import EngineConfig
from .engine import Engine
from .follow import keep_programs
from .heads import fingerprint
from .own_text import Dialogue, Text, write_texts
from .step import Blueprint, Params
from .train_draft import READ_TOKENS, Course, Judged, Trainer, read_texts

Progress = Callable[[str, int, int, str], None]
"""Called with a phase, what is done of how much, and how it goes."""
SHOW_STEPS, JUDGE_STEPS = 20, 400
"""Steps between two words of how far it is, and between two looks at how the heads do on texts they have not seen."""


def teach(
    config: EngineConfig,
    path: Path,
    texts: Sequence[int] | Dialogue,
    tokens: int,
    course: Course,
    folder: Path,
    progress: Progress,
) -> Judged:
    """Train heads for the model at `path` on the token ids of a text, or on what the model writes by itself, `tokens` of it;
    write them to `folder`. Says how they do. Raises PlanError, ModelError."""
    keep_programs(config)
    opened = open_model(path)
    if isinstance(texts, Dialogue):
        blueprint, params, learnt = _own(config, opened, texts, tokens, progress)
    else:
        blueprint, _, _ = design(config, opened.config)
        params = load_weights(
            config, blueprint, opened.source, lambda phase, done, total: progress(phase, done, total, "")
        )
        learnt = [Text(texts[start : start + READ_TOKENS], 1) for start in range(0, len(texts), READ_TOKENS)]
    thoughts = read_texts(blueprint, params, learnt, lambda done, total: progress("reading", done, total, ""))
    trainer = Trainer(blueprint, params, thoughts, course)
    judged = _train(trainer, progress)
    save_heads(folder, trainer.heads, fingerprint(blueprint.graph.specs, opened.source), config.model_id)
    return judged


def _own(
    config: EngineConfig, opened: OpenedModel, dialogue: Dialogue, tokens: int, progress: Progress
) -> tuple[Blueprint, Params, list[Text]]:
    """What the model writes, by way of a whole engine."""
    built = build(
        config, opened.config, opened.source, lambda phase, done, total: progress(phase, done, total, "")
    )
    engine = Engine(config, opened.config, built)
    stop_ids = tuple({*dialogue.stop_ids, *opened.config.eos_ids})
    try:
        texts = asyncio.run(
            write_texts(
                engine,
                replace(dialogue, stop_ids=stop_ids),
                tokens,
                lambda done, total: progress("writing", done, total, ""),
            )
        )
    finally:
        engine.stop()
    return (
        built.programs.blueprint,
        built.params,
        [Text(text.tokens[:READ_TOKENS], text.given) for text in texts],
    )


def _train(trainer: Trainer, progress: Progress) -> Judged:
    judged = trainer.judge()
    for step, loss in trainer.train():
        if step % SHOW_STEPS and step < trainer.steps:
            continue  # and the host is ahead of the device
        if step % JUDGE_STEPS == 0 or step == trainer.steps:
            judged = trainer.judge()
        progress("training", step, trainer.steps, f"loss {float(loss):.2f}; on unseen text {judged}")
    return judged
