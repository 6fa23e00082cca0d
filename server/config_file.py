"""Options from a file and to one: TOML, each option by its own name, limits in a table.

Knows the form of the file; what a value means is checked where those of the command line are (`options.py`).
"""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import LISTS, Flag, Options, UsageError, did_you_mean

DEFAULT = "default"
Configs = Mapping[str, Any]
"""By the name before the dot of an option's target."""


def read(path: str, flags: Iterable[Flag]) -> dict[str, str]:
    """Option name -> its raw value, as it would be typed. Raises UsageError, which names the file, for what is no TOML, no
    option among `flags`, or no value of one."""
    try:
        entries = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not TOML: {error}") from None
    known = {name: flag for flag in flags for name in flag.names if name != "config"}
    for name in entries:
        if name not in known:
            guess = (
                did_you_mean(name, known)
                or "; options are named as on the command line, without dashes in front"
            )
            raise UsageError(f"--config {path}: there is no option {name}{guess}")
    return {name: _raw(known[name], value, f"{name} in {path}") for name, value in entries.items()}


def _raw(flag: Flag, value: Any, origin: str) -> str:
    if flag.members and isinstance(value, dict):
        return ",".join(f"{name}={_raw(flag, inner, origin)}" for name, inner in value.items())
    if flag.kind in LISTS and isinstance(value, list):
        return ",".join(_raw(flag, item, origin) for item in value)
    if isinstance(value, bool) and (flag.kind == "bool" or flag.fate != "used"):
        return "true" if value else "false"
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    expected = {"bool": "true or false", "text": "a text in quotes"}.get(flag.kind, "a number")
    raise UsageError(f"{origin}: expected {'a list' if flag.kind in LISTS else expected}")


def write(flags: Sequence[Flag], configs: Configs, options: Options, *, origin: bool) -> list[str]:
    """The lines of a file that sets each option to what it is. With `origin` each says where its value is from.

    What the start decides is a comment, and so is a key."""
    bounds = [member for flag in flags for member in flag.members]

    def lines(some: Sequence[Flag]) -> list[str]:
        found = [_line(flag, value(flag, configs)) for flag in some]
        if not origin:
            return found
        width = max(map(len, found), default=0)
        return [
            f"{line:<{width}}  # {options.origins.get(flag.to, DEFAULT)}" for flag, line in zip(some, found)
        ]

    plain = [flag for flag in _settable(flags) if flag not in bounds]
    return [*lines(plain), *(["", "[limit]", *lines(bounds)] if bounds else [])]


def given(flags: Sequence[Flag], configs: Configs, options: Options) -> list[tuple[str, str]]:
    """(name, value and where it is from) of all that was not left to its default."""
    rows = ((flag, options.origins.get(flag.to)) for flag in _settable(flags))
    shown = (
        (flag, "not shown" if flag.secret else value(flag, configs), origin)
        for flag, origin in rows
        if origin
    )
    return [(flag.name, f"{text}, from {origin}") for flag, text, origin in shown]


def _settable(flags: Sequence[Flag]) -> list[Flag]:
    """Each option once, by the name it has here: of a bound that is the one in the table of limits."""
    bounds = {member.to: member for flag in flags for member in flag.members}
    return [*(flag for flag in flags if "." in flag.to and flag.to not in bounds), *bounds.values()]


def value(flag: Flag, configs: Configs) -> str | None:
    """What an option is, as TOML; None if that is left to the start."""
    config, _, field = flag.to.partition(".")
    found = getattr(configs[config], field)
    if field == "cache_dir" and found is None:
        found = "none"
    return (
        None if found is None else json.dumps(found, ensure_ascii=False)
    )  # Of these values both have one form.


def _line(flag: Flag, text: str | None) -> str:
    if text is None:
        return f"# {flag.name} is not set"
    return f"# {flag.name} is set, and not shown" if flag.secret else f"{flag.name} = {text}"
