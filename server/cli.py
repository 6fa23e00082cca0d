"""The command line: reads arguments and environment into frozen configs, runs one command, turns errors into exit codes.

Exit codes: 0 done · 1 a crash, ours or the engine's · 2 the command line or environment is wrong · 3 the model or the plan
cannot work here · 130 interrupted. Knows what commands exist, not how they work: a command's code is imported when it is
chosen, so that `--help` is quick.
"""

import ipaddress
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal

from ..engine.config import EngineConfig
from ..engine.errors import EngineError, EngineLost
from ..models.errors import ModelError
from . import config_file, flags
from .config import ServerConfig
from .flags import CONFIGS, RunConfig
from .options import TRUE, Flag, Options, UsageError, build_parser, did_you_mean, resolve

OK, CRASH, USAGE, CANNOT, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True, slots=True)
class Settings:
    """All that was asked for, checked."""

    engine: EngineConfig
    server: ServerConfig
    run: RunConfig
    options: Options
    """Options of one command only, notes, and where values came from."""
    environ: Mapping[str, str]
    """What it was read from."""

    @property
    def configs(self) -> dict[str, Any]:
        """By the names that options' targets begin with."""
        return {"engine": self.engine, "server": self.server, "run": self.run}


@dataclass(frozen=True, slots=True)
class Command:
    """One thing the program does."""

    name: str
    summary: str
    groups: Mapping[str, Sequence[Flag]]
    run: Callable[[Settings], int]
    takes_model: bool = True
    """Whether a bare word is the model's id."""


def _serve(settings: Settings) -> int:
    from .hosts import open_to_all

    server = settings.server
    if open_to_all(server):
        raise UsageError(
            f"{server.host} is reached from other machines, and no key is asked for: set API_KEY (or --api-key-file) to ask "
            "for one, --hostname 127.0.0.1 to stay on this machine, or --insecure to let everybody in"
        )
    if settings.options.plain("dry_run"):
        from .commands import dry_run

        given = config_file.given(_all(_SERVE), settings.configs, settings.options)
        return dry_run(settings.engine, server, settings.run, given)
    from .serve import serve

    return serve(settings.engine, server, settings.run)


def _engine(settings: Settings) -> int:
    from .commands import engine

    return engine(settings.engine, settings.run, settings.options)


def _download(settings: Settings) -> int:
    from .commands import download

    return download(settings.engine, settings.run)


def _plan(settings: Settings) -> int:
    from .commands import plan

    return plan(settings.engine, settings.run, settings.options)


def _warmup(settings: Settings) -> int:
    from .commands import warmup

    return warmup(settings.engine, settings.run)


def _train_draft(settings: Settings) -> int:
    from .train_draft import train_draft

    return train_draft(settings.engine, settings.run, settings.options)


def _bench(settings: Settings) -> int:
    from .commands import bench

    return bench(settings.engine, settings.run, settings.options)


def _bench_serve(settings: Settings) -> int:
    from .bench import bench

    return bench(settings.options.of(""))


def _top(settings: Settings) -> int:
    from .top import top

    return top(settings.options.of(""))


def _chat(settings: Settings) -> int:
    from .talk import chat

    return chat(settings.options.of(""))


def _batch(settings: Settings) -> int:
    from .batch import batch

    return batch(settings.engine, settings.server, settings.run, settings.options)


def _print_schema(settings: Settings) -> int:
    from .commands import print_schema

    return print_schema(settings.server)


def _doctor(settings: Settings) -> int:
    from .doctor import doctor

    as_json = bool(settings.options.plain("json"))
    return doctor(settings.engine, settings.server, settings.run, settings.environ, as_json=as_json)


def _config_show(settings: Settings) -> int:
    origin = bool(settings.options.plain("origin"))
    print("\n".join(config_file.write(_all(_SERVE), settings.configs, settings.options, origin=origin)))
    return OK


def _all(groups: Mapping[str, Sequence[Flag]]) -> list[Flag]:
    return [flag for group in groups.values() for flag in group]


_SIZES = {"Model": flags.MODEL, "Limits": flags.LIMITS, "Device": flags.DEVICE}
_TEXT = tuple(
    flag
    for flag in flags.HTTP
    if flag.name in ("tokenizer-config-path", "served-model-name", "reasoning-parser")
)
_SERVE = _SIZES | {"HTTP": flags.HTTP, "Process": flags.RUN, "From TGI": flags.FOREIGN}

COMMANDS = (
    Command("serve", "Serve a model over HTTP.", _SERVE | {"Process": (*flags.RUN, flags.DRY_RUN)}, _serve),
    Command("doctor", "Say whether a server could start here, and what to do if not.", _SERVE | {"Output": flags.JSON}, _doctor),
    Command("engine", "Run an engine alone, over gRPC.", _SIZES | {"Process": flags.ENGINE}, _engine),
    Command("download", "Fetch a model from the Hub.", {"Model": flags.MODEL, "Process": flags.LOG}, _download),
    Command("plan", "Say what fits and how fast it can be, here or on a chip not here.", _SIZES | {"Output": flags.PLAN}, _plan),
    Command("warmup", "Compile a model's programs into --cache-dir.", _SIZES | {"Process": flags.LOG}, _warmup),
    Command("train-draft", "Train draft heads for --draft-model.", {"Model": flags.MODEL, "Device": flags.DEVICE, "Training": flags.TRAIN}, _train_draft),
    Command("bench", "Measure the engine on this device.", _SIZES | {"Load": flags.BENCH}, _bench),
    Command("bench serve", "Measure a server over HTTP.", {"Load": flags.BENCH_SERVE}, _bench_serve, takes_model=False),
    Command("batch", "Answer a file of requests.", _SIZES | {"Text": _TEXT, "Batch": flags.BATCH}, _batch),
    Command("top", "Watch a server's lanes, live.", {"Server": flags.TOP}, _top, takes_model=False),
    Command("chat", "Talk to a server.", {"Server": flags.CHAT}, _chat, takes_model=False),
    Command("config show", "Print every option of a server, as a file for --config.", _SERVE | {"Output": flags.SHOW}, _config_show),
    Command("print-schema", "Print the HTTP API as OpenAPI.", {"API": flags.API_KEY}, _print_schema, takes_model=False),
)  # fmt: skip


def settle(
    command: Command, argv: Sequence[str], environ: Mapping[str, str], defaults: Mapping[str, Any]
) -> Settings:
    """Arguments and environment as configs. Raises UsageError; prints help and exits 0 for `--help`."""
    groups = {
        title: tuple(replace(flag, default=defaults.get(flag.name, flag.default)) for flag in group)
        for title, group in command.groups.items()
    }
    parser = build_parser(f"xlane {command.name}", command.summary, groups, CONFIGS, _epilog(command))
    parser.usage = f"xlane {command.name}{' [MODEL]' if command.takes_model else ''} [OPTION...]"
    if command.takes_model:
        parser.add_argument("model", nargs="?", metavar="MODEL", help="The same as --model-id.")
    typed = vars(parser.read(argv))
    if model := typed.pop("model", None):
        if typed["model-id"] not in (None, model):
            raise UsageError(f"two models: {model} and --model-id {typed['model-id']}")
        typed["model-id"] = model
    if typed.get("progress-fd") is not None:
        environ = {}  # A front started this engine and has put all it read from the environment on our command line.
    notes: list[str] = []
    environ = _tidy(environ, typed, notes)
    options = resolve(_all(groups), typed, environ, *_file(groups, typed, environ))
    if "From TGI" in groups:
        notes += [
            f"{name} has no meaning here: {why}"
            for name, why in flags.ENV_WITHOUT_MEANING.items()
            if name in environ
        ]
    options.notes[:0] = notes
    _agree(options)
    if options.of("run").get("engines"):
        from .engines import check_engines

        check_engines(options)
    engine = EngineConfig(**{"model_id": "demo", **options.of("engine")})
    return Settings(
        engine, ServerConfig(**options.of("server")), RunConfig(**options.of("run")), options, environ
    )


def _file(
    groups: Mapping[str, Sequence[Flag]], typed: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """What --config says, and its path. It may say all that a server takes, whichever command reads it."""
    path = typed.get(flags.FILE.name) or environ.get(flags.FILE.env)
    if path is None or flags.FILE not in _all(groups):
        return {}, ""
    return config_file.read(path, _all(_SERVE | dict(groups))), path


def _tidy(environ: Mapping[str, str], typed: Mapping[str, Any], notes: list[str]) -> Mapping[str, str]:
    """Variables that others set for their own ends, made fit: a container's HOSTNAME, a filter in LOG_LEVEL."""
    tidy = dict(environ)
    host = tidy.get("HOSTNAME")
    if host is not None and not _is_address(host):
        del tidy["HOSTNAME"]
        if typed.get("hostname", "") is None:
            notes.append(
                f"HOSTNAME={host} is the machine's name, not an address to listen on; --hostname sets that"
            )
    if tidy.get("SM_NUM_GPUS") == "0":
        del tidy["SM_NUM_GPUS"]  # SageMaker on a machine without: as many as there are of whatever is there.
    level = tidy.get("LOG_LEVEL", "").split(",")[0].lower()
    tidy["LOG_LEVEL"] = {"warn": "warning", "trace": "debug"}.get(level, level)
    if "=" in level:
        tidy["LOG_LEVEL"] = ""
        notes.append(f"LOG_LEVEL={environ['LOG_LEVEL']} filters by TGI's modules; --log-level sets the level")
    return tidy


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def _agree(options: Options) -> None:
    """Refuse values that contradict each other, and fold `--sharded` into the number of shards."""
    engine = options.values.setdefault("engine", {})
    most_input, most = engine.get("max_input_tokens"), engine.get("max_total_tokens")
    if most_input is not None and most is not None and most_input >= most:
        raise UsageError(f"--max-input-tokens {most_input} must be less than --max-total-tokens {most}")
    sharded, shards = options.plain("sharded"), engine.get("model_parallel")
    if sharded is False:
        if shards not in (None, 1):
            raise UsageError(f"--sharded false contradicts --num-shard {shards}")
        engine["model_parallel"] = 1
        options.origins.setdefault("engine.model_parallel", options.origins["sharded"])
    elif sharded and shards == 1:
        raise UsageError("--sharded true contradicts --num-shard 1")
    engine["cache_dir"] = _cache_dir(engine.get("cache_dir"))


def _cache_dir(given: str | None) -> str | None:
    from ..models.demo import default_cache_dir

    if given == "none":
        return None
    return str(default_cache_dir()) if given is None else os.path.expanduser(given)


def _epilog(command: Command) -> str:
    hidden = [flag for flag in _all(command.groups) if flag.fate == "used"]
    names = [f"--{name}" for flag in hidden for name in (flag.names if flag.hidden else flag.also)]
    lines = [
        "Each option is also read from the variable in brackets; what is typed wins, then variables, then --config."
    ]
    if names:
        lines += ["", "Known from TGI and platforms, seldom needed:", *_wrapped(names)]
    if "From TGI" in command.groups:
        lines += [
            "Accepted from TGI, without meaning here:",
            *_wrapped([flag.option for flag in flags.NO_MEANING]),
            "Known from TGI and refused:",
            *_wrapped([flag.option for flag in flags.REFUSED]),
        ]
    return "\n".join(
        [*lines, "", "Exit codes: 0 done, 1 crash, 2 usage, 3 model or plan cannot work, 130 interrupted."]
    )


def _wrapped(words: Sequence[str]) -> list[str]:
    import textwrap

    return textwrap.wrap(
        ", ".join(words), 96, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def overview() -> str:
    """What `xlane --help` prints."""
    lines = ["usage: xlane COMMAND [MODEL] [OPTION...]", "", "LLM serving compiled by XLA.", ""]
    lines += [f"  {command.name:<12} {command.summary}" for command in COMMANDS]
    return "\n".join(
        [*lines, "", "`xlane COMMAND --help` lists a command's options. `xlane serve` alone serves a demo."]
    )


def choose(argv: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """The command of `argv` and its arguments. Raises UsageError."""
    for length in (2, 1):
        for command in COMMANDS:
            if argv[:length] == command.name.split():
                return command, argv[length:]
    word = argv[0] if argv else ""
    names = [command.name for command in COMMANDS]
    if not word:
        raise UsageError(f"a command is missing: one of {', '.join(names)}")
    raise UsageError(
        f"there is no command {word}{did_you_mean(word, names) or ': one of ' + ', '.join(names)}"
    )


def run(argv: Sequence[str], environ: Mapping[str, str], defaults: Mapping[str, Any] | None = None) -> int:
    """Run one command line and return its exit code. Errors end as one line on stderr."""
    as_json = _asks_for_json(argv, environ)
    try:
        if not argv or argv[:1] in (["-h"], ["--help"]):
            print(overview())
            return OK if argv else USAGE
        if argv[:1] in (["-V"], ["--version"]):
            print(f"xlane {metadata.version('xlane')}")
            return OK
        command, rest = choose(argv)
        settings = settle(command, rest, environ, defaults or {})
        as_json = settings.run.json_output
        for note in settings.options.notes:
            _tell("note", note, as_json)
        return command.run(settings)
    except (EngineError, ModelError, UsageError) as error:
        _tell("error", str(error), as_json)
        return USAGE if isinstance(error, UsageError) else CRASH if isinstance(error, EngineLost) else CANNOT
    except KeyboardInterrupt:
        return INTERRUPTED


def _asks_for_json(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether --json-output is asked for, as far as that can be said of a command line that may make no sense."""
    typed = [word.partition("=")[2] or "true" for word in argv if word.split("=")[0] == "--json-output"]
    return [environ.get("JSON_OUTPUT", ""), *typed][-1].lower() in TRUE


def _tell(kind: Literal["note", "error"], text: str, as_json: bool) -> None:
    """One line on stderr, before or after there is a console."""
    if as_json:
        from .logs import json_line

        line = json_line("ERROR" if kind == "error" else "INFO", {"message": text}, "xlane")
    else:
        line = f"{kind}: {text}"
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """`xlane`."""
    _set_environment()
    try:
        code = run(sys.argv[1:], os.environ)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # Who reads has left, as `head` does; Python would say so once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CRASH


def _set_environment() -> None:
    """What libraries read from the environment only."""
    # Only tokenizers and templates are used of it, and each process would say that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # TGI reads it under another name than the Hub client does.
    if "HF_API_TOKEN" in os.environ:
        os.environ.setdefault("HF_TOKEN", os.environ["HF_API_TOKEN"])


def launcher() -> int:
    """`text-generation-launcher`: `xlane serve` with the defaults Text Generation Inference has."""
    argv = sys.argv[1:]
    if argv[:1] in (["-V"], ["--version"]):
        return run(argv, os.environ)
    _set_environment()
    return run(["serve", *argv], os.environ, flags.TGI_DEFAULTS)
