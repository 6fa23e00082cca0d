"""What the programs that do harm to a running server share: their options, and the server. Knows nothing of the harm."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.whole_server import Served, whole_server


def arguments(doc: str | None, **numbers: float) -> argparse.Namespace:
    """`--model`, and an option for each of the numbers, which is its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    for name, number in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(number), default=number)
    return parser.parse_args()


@contextmanager
def shaken_server(model: str, *options: str, module: str = "xlane.server") -> Iterator[Served]:
    """The model, with guesses on, and patient with whatever else the machine is busy with."""
    patient = [f"--limit={name}=600" for name in ("template_timeout_s", "grammar_timeout_s", "header_timeout_s", "body_timeout_s")]  # fmt: skip
    whole = ("--model-id", model, "--speculate", "4", "--kv-bytes", str(2**29), *patient)
    with (
        tempfile.TemporaryDirectory() as folder,
        whole_server(Path(folder, "log"), *whole, *options, module=module) as served,
    ):
        yield served
