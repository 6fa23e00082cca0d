"""How an option declared once becomes a command-line flag, an environment variable, a line of a file and a value of a
frozen config.

Knows how to parse, complain and explain. Which options exist is the table in `flags.py`; nothing is read from the
environment or a file but through the mappings a caller hands in.
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
    also: tuple[str, ...] = ()
    """Names that TGI has for the same, each with its variable."""
    hidden: bool = False
    """Named at the end of the help only: for those who come from elsewhere, or set by a platform."""
    secret: bool = False
    """Never shown."""
    members: "tuple[Flag, ...]" = ()
    """What NAME may be in a list of NAME=VALUE; each goes where its own target says."""
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

    @property
    def names(self) -> tuple[str, ...]:
        """All it is called by, without dashes."""
        return (self.name, *self.also)

    @property
    def listed(self) -> bool:
        """Whether the help explains it."""
        return self.fate == "used" and not self.hidden


@dataclass(frozen=True, slots=True)
class Given:
    """A raw value and where it came from."""

    flag: Flag
    raw: str
    origin: str
    """`--port`, `PORT` or `port in xlane.toml`, for messages."""
    rank: int
    """0 typed, 1 from the environment, 2 from the file: the least wins."""


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
        """Parse all of `argv` or raise UsageError. A word after a switch is its value only if it says yes or no."""
        switches = {name for action in self._actions if action.nargs == "?" for name in action.option_strings}
        words = [
            f"{word}=true" if word in switches and after.lower() not in (*TRUE, *FALSE) else word
            for word, after in zip(argv, [*argv[1:], ""])
        ]
        namespace, rest = self.parse_known_args(words)
        if rest:
            word = rest[0].split("=")[0]
            hidden = {action.dest: action.help is argparse.SUPPRESS for action in self._actions}
            names = [
                (option, hidden[action.dest]) for action in self._actions for option in action.option_strings
            ]
            # One that the help explains before one that only somebody else's habits need.
            listed, others = ([name for name, hides in names if hides == wanted] for wanted in (False, True))
            guess = did_you_mean(word, listed) or did_you_mean(word, others)
            raise UsageError(f"unknown option {word}{guess} (see `{self.prog} --help`)")
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
            shown = _help(flag, defaults).replace("%", "%%") if flag.listed else argparse.SUPPRESS
            extra: dict[str, Any] = {"action": "append"} if flag.kind in LISTS else {}
            if flag.kind == "bool":
                extra = {"nargs": "?", "const": "true", "metavar": "BOOL"}
            elif flag.choices:
                extra["metavar"] = "{" + ",".join(flag.choices) + "}"
            else:
                extra["metavar"] = {"int": "N", "float": "X"}.get(flag.kind, "VALUE")
            section.add_argument(*names, dest=flag.name, default=None, help=shown, **extra)
            for name in flag.also:
                section.add_argument(f"--{name}", dest=name, default=None, help=argparse.SUPPRESS, **extra)
    return parser


def _help(flag: Flag, defaults: Mapping[str, type]) -> str:
    default = default_text(flag, defaults)
    marks = [flag.help, default and f"[default: {default}]", flag.env and f"[{flag.env}]"]
    return " ".join(mark for mark in marks if mark)


def default_text(flag: Flag, defaults: Mapping[str, type]) -> str:
    """What an option is when nobody sets it; empty if that is nothing, or is decided at start."""
    default = flag.default
    config, _, name = flag.to.partition(".")
    if default is None and config in defaults:
        default = next(f.default for f in dataclasses.fields(defaults[config]) if f.name == name)
    if default is None or default is dataclasses.MISSING or default in ((), False, ""):
        return ""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def resolve(
    flags: Sequence[Flag],
    typed: Mapping[str, Any],
    environ: Mapping[str, str],
    written: Mapping[str, str] | None = None,
    file: str = "",
) -> Options:
    """Command line, then environment, then what is `written` in `file` (by name), then default; converted and checked.

    Raises UsageError."""
    options = Options()
    taken: dict[str, Given] = {}
    for flag in flags:
        if flag.to and flag.default is not None:
            _store(options, flag.to, flag.default)
    for given in _given(flags, typed, environ, written or {}, file):
        flag = given.flag
        key = flag.to or flag.name
        other = taken.get(key)
        if other and other.rank == given.rank and other.origin != given.origin:
            raise UsageError(f"give {other.origin} or {given.origin}, not both: they mean the same")
        if other and other.rank < given.rank:
            continue
        taken[key] = given
        if flag.fate == "refused":
            if flag.kind != "bool" or given.raw.lower() not in FALSE:
                raise UsageError(f"{given.origin}={given.raw} is not supported: {flag.why}")
        elif flag.fate == "no meaning":
            options.notes.append(f"{given.origin} has no meaning here: {flag.why}")
        else:
            _store(options, flag.to, convert(given))
            options.origins[flag.to] = given.origin
    return options


def _given(
    flags: Sequence[Flag],
    typed: Mapping[str, Any],
    environ: Mapping[str, str],
    written: Mapping[str, str],
    file: str,
) -> Iterable[Given]:
    """All that was given, the strongest source first."""
    for flag in flags:
        for name in flag.names:
            if (raw := typed.get(name)) is not None:
                raw = ",".join(raw) if isinstance(raw, list) else raw
                yield from _members(Given(flag, raw, f"--{name}", 0))
    for flag in flags:
        own = next((name for name in (*flag.platform_env, flag.env) if name and environ.get(name)), None)
        for name in (own, *(name.upper().replace("-", "_") for name in flag.also)):
            if name and environ.get(name):
                yield from _members(Given(flag, environ[name], name, 1))
    for flag in flags:
        for name in flag.names:
            if name in written:
                yield from _members(Given(flag, written[name], f"{name} in {file}", 2))


def _members(given: Given) -> Iterable[Given]:
    """The option itself, or what its NAME=VALUEs set. Raises UsageError for a name it does not have."""
    members = {member.name: member for member in given.flag.members}
    if not members:
        yield given
        return
    for item in filter(None, (part.strip() for part in given.raw.split(","))):
        name, _, value = item.partition("=")
        if name not in members:
            guess = did_you_mean(name, members) or ": " + ", ".join(members)
            raise UsageError(f"{given.origin} {item}: there is no such {given.flag.name}{guess}")
        yield Given(members[name], value, f"{given.origin} {name}", given.rank)


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
        noun += f" from {low} to {high}"
    elif low is not None:
        noun += f" of at least {low}"
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
