"""Writes the tables of docs/from-tgi.md from the options there are: `python -m tests.deploy.from_tgi`."""

from collections.abc import Iterable
from pathlib import Path

from xlane.server import flags
from xlane.server.options import Flag

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-tgi.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


def of_tgi(flag: Flag) -> bool:
    """Whether TGI has an option of this name: its variable is the name itself, ours begin with XLANE_."""
    return flag.name == "env" or flag.env == flag.name.upper().replace("-", "_")


def working() -> list[tuple[str, str]]:
    """TGI's options that have their effect here, in the order of the help, and which."""
    rows: list[tuple[str, str]] = []
    for flag in (*flags.MODEL, *flags.LIMITS, *flags.DEVICE, *flags.HTTP, *flags.RUN):
        if of_tgi(flag):
            rows.append((flag.option, effect(flag)))
        rows += [(f"--{name}", f"The same as `{flag.option}`.") for name in flag.also]
    return rows


def effect(flag: Flag) -> str:
    """What an option does here, and for which values."""
    text = flag.help
    if flag.choices:
        text += f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}."
    if flag.refused:
        text += f" Refused: {', '.join(f'`{value}`' for value in flag.refused)}."
    return text


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows)]
    return "\n".join(lines) + "\n"


def tables() -> str:
    return "\n".join(
        [
            "## What works\n",
            table(("Option", "What it does here"), working()),
            "## What is taken and has no meaning here\n\nA note in the log says so.\n",
            table(("Option", "Why"), ((flag.option, flag.why) for flag in flags.NO_MEANING)),
            table(("Variable", "Why"), flags.ENV_WITHOUT_MEANING.items()),
            "## What is refused\n\nAnswers would not be those that were asked for.\n",
            table(("Option", "Why, and what instead"), ((flag.option, flag.why) for flag in flags.REFUSED)),
        ]
    )


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
