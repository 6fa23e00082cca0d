"""How an option declared once becomes a command-line flag, an environment variable and a value of a frozen config.

Knows how to parse, complain and explain. Which options exist is the table in `flags.py`; nothing is read from the
environment but through the mapping a caller hands in.
"""

import argparse
import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class UsageError(Exception):
    """What was asked for cannot be meant; the message is one line that says what is allowed."""


Kind = Literal["text", "int", "float", "bool", "list", "ints", "floats"]
"""A list (`ints`: of whole numbers, `floats`: of any) takes commas and may be repeated."""
LISTS = ("list", "ints", "floats")


@dataclass(frozen=True, slots=True)
class Flag:
    """One option."""

    name: str
    """Without dashes: `max-total-tokens`."""
    to: str = ""
    """Where the value goes: `engine.max_total_tokens`. A plain option of one command has no config and no dot."""
    help: str = ""
    kind: Kind = "text"
    env: str = ""
    """The variable that also sets it; empty for none."""
    platform_env: tuple[str, ...] = ()
    """Variables by which hosting platforms set it, which win over `env`: an image presets that one."""
    short: str = ""
    default: Any = None
    """Used when neither flag nor variable is there; None leaves the config's own default."""
    choices: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Values that others have and we do not -> what to use instead."""
    must_start: str = ""
    """What a text has to begin with."""
    at_least: float | None = None
    at_most: float | None = None
    fate: Literal["used", "no meaning", "refused"] = "used"
    why: str = ""
    """For the two other fates: the reason, and what to do instead."""

    @property
    def option(self) -> str:
        """As typed."""
        return f"--{self.name}"


@dataclass(frozen=True, slots=True)
class Given:
    """A raw value and where it came from."""

    flag: Flag
    raw: str
    origin: str
    """`--port` or `PORT`, for messages."""
    typed: bool
    """On the command line, which wins over the environment."""


@dataclass(slots=True)
class Options:
    """What was asked for: config name -> field -> value (plain options under ``), and what to tell the user."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    """Target -> where its value came from; absent for defaults."""

    def of(self, config: str) -> dict[str, Any]:
        """Keyword arguments for one config."""
        return self.values.get(config, {})

    def plain(self, name: str) -> Any:
        """The value of an option that belongs to no config."""
        return self.of("").get(name)


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting and guesses what a mistyped flag was meant to be."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv` or raise UsageError."""
        namespace, rest = self.parse_known_args(list(argv))
        if rest:
            word = rest[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            raise UsageError(f"unknown option {word}{did_you_mean(word, known)} (see `{self.prog} --help`)")
        return namespace


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` - did you mean a or b?`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""


def build_parser(
    prog: str,
    summary: str,
    groups: Mapping[str, Sequence[Flag]],
    defaults: Mapping[str, type],
    epilog: str = "",
) -> Parser:
    """A parser whose values are all raw text; `resolve` gives them types, as it does for the environment."""
    parser = Parser(
        prog=prog,
        description=summary,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, flags in groups.items():
        section = parser.add_argument_group(title)
        for flag in flags:
            names = [*([f"-{flag.short}"] if flag.short else []), flag.option]
            shown = argparse.SUPPRESS if flag.fate != "used" else _help(flag, defaults).replace("%", "%%")
            extra: dict[str, Any] = {"action": "append"} if flag.kind in LISTS else {}
            if flag.kind == "bool":
                extra = {"nargs": "?", "const": "true", "metavar": "BOOL"}
            elif flag.choices:
                extra["metavar"] = "{" + ",".join(flag.choices) + "}"
            else:
                extra["metavar"] = {"int": "N", "float": "X"}.get(flag.kind, "VALUE")
            section.add_argument(*names, dest=flag.name, default=None, help=shown, **extra)
    return parser


def _help(flag: Flag, defaults: Mapping[str, type]) -> str:
    default = flag.default
    config, _, name = flag.to.partition(".")
    if default is None and config in defaults:
        default = next(f.default for f in dataclasses.fields(defaults[config]) if f.name == name)
    marks = [flag.help]
    if default is not None and default is not dataclasses.MISSING and default not in ((), False, ""):
        marks.append(f"[default: {','.join(map(str, default)) if isinstance(default, tuple) else default}]")
    if flag.env:
        marks.append(f"[{flag.env}]")
    return " ".join(marks)


def resolve(flags: Iterable[Flag], typed: Mapping[str, Any], environ: Mapping[str, str]) -> Options:
    """Command line, then environment, then default; converted and checked. Raises UsageError."""
    options = Options()
    taken: dict[str, Given] = {}
    for flag in flags:
        if flag.to and flag.default is not None:
            _store(options, flag.to, flag.default)
    for given in _given(flags, typed, environ):
        flag = given.flag
        if flag.fate == "refused":
            if flag.kind != "bool" or given.raw.lower() not in FALSE:
                raise UsageError(f"{given.origin}={given.raw} is not supported: {flag.why}")
        elif flag.fate == "no meaning":
            options.notes.append(f"{given.origin} has no meaning here: {flag.why}")
        else:
            other = taken.get(flag.to)
            if other and other.typed == given.typed:
                raise UsageError(f"give {other.origin} or {given.origin}, not both: they mean the same")
            if other and other.typed:
                continue
            taken[flag.to] = given
            _store(options, flag.to, convert(given))
            options.origins[flag.to] = given.origin
    return options


def _given(flags: Iterable[Flag], typed: Mapping[str, Any], environ: Mapping[str, str]) -> Iterable[Given]:
    for flag in flags:
        raw = typed.get(flag.name)
        if raw is not None:
            yield Given(flag, ",".join(raw) if isinstance(raw, list) else raw, flag.option, True)
            continue
        for name in (*flag.platform_env, flag.env):
            if name and environ.get(name, "") != "":
                yield Given(flag, environ[name], name, False)
                break


def _store(options: Options, target: str, value: Any) -> None:
    config, _, name = target.rpartition(".")
    options.values.setdefault(config, {})[name] = value


def convert(given: Given) -> Any:
    """The typed value of one option. Raises UsageError naming the value and what is allowed."""
    flag, raw = given.flag, given.raw.strip()
    if flag.kind == "bool":
        if raw.lower() not in (*TRUE, *FALSE):
            raise UsageError(f"{given.origin}={raw}: expected true or false")
        return raw.lower() in TRUE
    if flag.kind in LISTS:
        parts = tuple(part.strip() for part in raw.split(",") if part.strip())
        return parts if flag.kind == "list" else tuple(_number(given, part) for part in parts)
    if flag.kind == "text":
        if raw in flag.refused:
            raise UsageError(f"{given.origin}={raw} is not supported: {flag.refused[raw]}")
        if flag.choices and raw not in flag.choices:
            raise UsageError(
                f"{given.origin}={raw}: expected one of {', '.join(flag.choices)}{_and(flag.why)}"
            )
        if not raw.startswith(flag.must_start):
            raise UsageError(f"{given.origin}={raw}: expected a value that starts with {flag.must_start}")
        return raw
    return _number(given, raw)


def _number(given: Given, raw: str) -> float:
    flag = given.flag
    fractional = flag.kind in ("float", "floats")
    noun = "a number" if fractional else "a whole number"
    low, high = flag.at_least, flag.at_most
    if low is not None and high is not None:
        noun += f" from {low:g} to {high:g}"
    elif low is not None:
        noun += f" of at least {low:g}"
    try:
        value = float(raw) if fractional else int(raw.replace("_", ""))
    except ValueError:
        raise UsageError(f"{given.origin}={raw}: expected {noun}") from None
    out = not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high)
    if out:
        raise UsageError(f"{given.origin}={raw}: expected {noun}")
    return value


def _and(why: str) -> str:
    return f" ({why})" if why else ""
