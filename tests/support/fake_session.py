"""A whole server run over the fake engine: `python -m tests.support.fake_session MODEL_DIRECTORY [TURN_S [GRACE_S]]`.

Everything is real but the engine's arithmetic: sockets, processes, pipes, signals. The model directory only needs a
tokenizer, which `fake_model` makes.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from .fake_core import VOCAB_SIZE


def fake_model(directory: Path) -> Path:
    """A directory that passes for a model: token n is written `wn`, and there are no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, VOCAB_SIZE)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def write_tokenizer(directory: Path, vocab_size: int, **settings: object) -> None:
    """A tokenizer whose token n is the word `wn`."""
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.decoder = WordPiece(prefix="")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 4096, **settings}))


def main(directory: str, turn_s: str = "0.002", grace_s: str = "20", engine: str = "") -> int:
    """Serve until a signal. `engine` is a script that runs the engine; default the fake one."""
    import uvloop

    from xlane.engine import EngineConfig
    from xlane.server.config import ServerConfig
    from xlane.server.console import Console
    from xlane.server.flags import RunConfig
    from xlane.server.session import Session

    runs = [engine] if engine else ["-m", "tests.support.fake_core"]
    command = [sys.executable, *runs, "--turn-s", turn_s]
    config = ServerConfig(port=0, graceful_termination_timeout_s=float(grace_s))
    console = Console(json_output=True)
    session = Session(EngineConfig(model_id=directory), config, RunConfig(), console, command)
    return uvloop.run(session.run())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
