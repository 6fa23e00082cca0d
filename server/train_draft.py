"""`xlane train-draft`: the text side of training draft heads. Knows the chat template and what is shown; no training."""

from pathlib import Path

from ..engine.config import EngineConfig
from ..models.errors import TokenizerError
from ..models.tokenizer import TextTokenizer
from .commands import console_of, find
from .flags import RunConfig
from .options import Options, UsageError

QUESTION = "xlane-question"
"""Stands for what a user says, where a template shall show what comes before and after it."""


def train_draft(config: EngineConfig, run: RunConfig, options: Options) -> int:
    """Train heads, show how it goes, and say how to use them."""
    console = console_of(run)
    path = find(config, run, console)
    from ..engine.own_text import Dialogue
    from ..engine.teach import teach
    from ..engine.train_draft import Course

    tokenizer = TextTokenizer.from_path(path)
    given, folder = options.plain("text"), Path(options.plain("output"))
    texts = Dialogue(*chat_around(tokenizer), tokenizer.eos_ids) if given is None else _read(tokenizer, given)
    course = Course(heads=options.plain("heads"), epochs=options.plain("epochs"))

    def progress(phase: str, done: int, total: int, detail: str) -> None:
        console.progress(phase, done, total, "B" if phase == "weights" else "", detail)

    judged = teach(config, path, texts, options.plain("tokens"), course, folder, progress)
    console.settle()
    console.say(f"on text that they have not seen: {judged}")
    console.say(f"xlane serve {config.model_id} --speculate {course.heads} --draft-model {folder}")
    return 0


def chat_around(tokenizer: TextTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What comes before a user's words in a chat, and between them and the answer; of a model without a chat template how
    a text begins, and nothing."""
    try:
        before, after = tokenizer.apply_chat([{"role": "user", "content": QUESTION}]).split(QUESTION)
    except (TokenizerError, ValueError):  # no template, or none that says it once
        return tuple(tokenizer.encode("") or tokenizer.eos_ids[:1]), ()
    return tuple(tokenizer.encode(before, False)), tuple(tokenizer.encode(after, False))


def _read(tokenizer: TextTokenizer, name: str) -> list[int]:
    try:
        return tokenizer.encode(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {name} cannot be read: {error}") from error
