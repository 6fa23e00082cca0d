"""The command line: what is typed or set arrives in the right config, and what is wrong is told in one line."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from xlane.engine import EngineConfig, EngineLost, PlanError
from xlane.models.errors import HubError
from xlane.server import cli, flags
from xlane.server.bounds import BOUNDS
from xlane.server.cli import COMMANDS, Settings, choose, settle
from xlane.server.config import ServerConfig
from xlane.server.options import UsageError

ALL = [flag for command in COMMANDS for group in command.groups.values() for flag in group]


def read(
    line: str, environ: Mapping[str, str] | None = None, defaults: Mapping[str, Any] | None = None
) -> Settings:
    command, rest = choose(line.split())
    return settle(command, rest, environ or {}, defaults or {})


def refused(line: str, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        read(line, environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_given_serves_the_demo_on_this_machine_only():
    settings = read("serve")
    assert settings.engine.model_id == "demo"
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 3000)
    assert settings.options.notes == []


def test_every_target_is_a_field_of_its_config():
    for flag in ALL:
        config, _, field = flag.to.partition(".")
        if field:
            assert field in {known.name for known in dataclasses.fields(flags.CONFIGS[config])}, flag.name


def test_every_engine_choice_has_an_option():
    reachable = {flag.to for flag in ALL}
    assert {f"engine.{field.name}" for field in dataclasses.fields(EngineConfig)} <= reachable


def test_no_option_or_variable_twice_in_a_command():
    for command in COMMANDS:
        options = [flag for group in command.groups.values() for flag in group]
        for names in ([flag.name for flag in options], [flag.env for flag in options if flag.env]):
            assert len(names) == len(set(names)), command.name


def test_every_option_tgi_has_is_known():
    listed = """model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
        trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens max-input-tokens
        max-input-length max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens
        max-waiting-tokens max-batch-size cuda-graphs hostname port prometheus-port shard-uds-path master-addr
        master-port huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction
        rope-scaling rope-factor json-output otlp-endpoint otlp-service-name cors-allow-origin api-key
        watermark-gamma watermark-delta ngrok ngrok-authtoken ngrok-edge tokenizer-config-path
        disable-grammar-support env max-client-batch-size lora-adapters usage-stats payload-limit
        enable-prefill-logprobs graceful-termination-timeout""".split()  # noqa: SIM905
    serve = {flag.name: flag for group in COMMANDS[0].groups.values() for flag in group}
    others = {name for flag in serve.values() for name in flag.also}
    assert [name for name in listed if name not in {*serve, *others}] == []
    own = set(listed) - others - {"env"}
    assert [name for name in own if serve[name].env != name.upper().replace("-", "_")] == []


def test_the_help_of_serve_can_be_read():
    assert sum(flag.listed for group in COMMANDS[0].groups.values() for flag in group) <= 60


def test_a_tgi_command_line_works():
    settings = read(
        "serve --model-id org/model --revision refs/pr/3 --num-shard 2 --max-input-length 1000 --max-total-tokens 2048"
        " --max-batch-prefill-tokens 4096 -p 8080 --hostname 0.0.0.0 --json-output --cuda-graphs 1,2 -g 30"
        " --cors-allow-origin http://a --cors-allow-origin http://b --usage-stats off --trust-remote-code"
    )
    engine, server = settings.engine, settings.server
    assert (engine.model_id, engine.revision, engine.model_parallel) == ("org/model", "refs/pr/3", 2)
    assert (engine.max_input_tokens, engine.max_total_tokens, engine.prefill_chunk_tokens) == (
        1000,
        2048,
        4096,
    )
    assert (server.host, server.port, server.graceful_termination_timeout_s) == ("0.0.0.0", 8080, 30)
    assert server.cors_allow_origins == ("http://a", "http://b")
    assert settings.run.json_output
    notes = settings.options.notes
    assert [note.split()[0] for note in notes] == ["--trust-remote-code", "--cuda-graphs", "--usage-stats"]


def test_variables_work_and_what_is_typed_wins():
    environ = {
        "MODEL_ID": "a/b",
        "PORT": "8080",
        "MAX_TOTAL_TOKENS": "512",
        "API_KEY": "k",
        "JSON_OUTPUT": "true",
    }
    settings = read("serve --port 9090 --max-total-tokens=256", environ)
    assert (settings.engine.model_id, settings.engine.max_total_tokens) == ("a/b", 256)
    assert (settings.server.port, settings.server.api_key, settings.run.json_output) == (9090, "k", True)


def test_a_list_of_numbers():
    assert read("bench --concurrency 1,2 --concurrency 16").options.plain("concurrency") == (1, 2, 16)


def test_own_variables_have_a_prefix():
    assert read("serve", {"XLANE_MAX_QUEUED": "3", "MAX_QUEUED": "9"}).engine.max_queued == 3
    assert read("serve --drain-delay 7.5").server.drain_delay_s == 7.5


def test_the_launcher_differs_where_tgi_does():
    server = read("serve", defaults=flags.TGI_DEFAULTS).server
    assert (server.host, server.port, server.cors_allow_origins) == ("0.0.0.0", 3000, ("*",))
    # Its clients count on these; OpenAI's send more.
    assert (server.max_stop_sequences, server.max_client_batch_size) == (4, 4)
    assert (
        read("serve --limit max_stop_sequences=9", defaults=flags.TGI_DEFAULTS).server.max_stop_sequences == 9
    )
    server = read("serve").server
    assert (server.max_stop_sequences, server.max_client_batch_size) == (64, 64)
    assert read("serve --hostname 127.0.0.1", defaults=flags.TGI_DEFAULTS).server.host == "127.0.0.1"


def test_a_containers_hostname_is_no_address():
    settings = read("serve", {"HOSTNAME": "3f2a9c"}, flags.TGI_DEFAULTS)
    assert settings.server.host == "0.0.0.0"
    assert "HOSTNAME=3f2a9c" in settings.options.notes[0]
    assert read("serve", {"HOSTNAME": "10.0.0.7"}).server.host == "10.0.0.7"


@pytest.mark.parametrize(
    ("value", "level"),
    [("info,text_generation_router=debug", "info"), ("WARN", "warning"), ("trace", "debug")],
)
def test_tgis_log_levels(value: str, level: str):
    assert read("serve", {"LOG_LEVEL": value}).run.log_level == level


def test_a_model_may_be_a_bare_word():
    assert read("serve org/model --port 1").engine.model_id == "org/model"
    settings = read("serve --insecure org/model --json-output false -e")
    assert (settings.engine.model_id, settings.server.insecure) == ("org/model", True)
    assert (settings.run.json_output, settings.run.show_env) == (False, True)
    assert "two models" in refused("serve org/a --model-id org/b")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("serve --prot 80", "--prot: did you mean --port? (see"),
        ("serve --max-input-lenght 80", "did you mean --max-input-tokens"),
        ("serve --ngrokk", "did you mean --ngrok"),
        ("serve --max-totl-tokens=80", "--max-totl-tokens: did you mean --max-total-tokens"),
        ("serv", "did you mean serve"),
        ("", "a command is missing"),
        ("frobnicate", "one of serve"),
        ("serve --port abc", "--port=abc: expected a whole number from 0 to 65535"),
        ("serve --port 70000", "--port=70000: expected a whole number from 0 to 65535"),
        (
            "serve --dtype float16",
            "--dtype=float16: expected one of float32, bfloat16 (for float16 take bfloat16",
        ),
        ("serve --memory-fraction nan", "--memory-fraction=nan: expected a number from 0.01 to 1"),
        ("bench --concurrency 1,two", "--concurrency=two: expected a whole number of at least 1"),
        ("bench serve --concurrency 0", "--concurrency=0: expected a whole number of at least 1"),
        ("serve --json-output=maybe", "--json-output=maybe: expected true or false"),
        ("serve --port", "expected one argument"),
        ("serve --max-input-tokens 8 --max-total-tokens 8", "--max-input-tokens 8 must be less than"),
        ("serve --max-input-tokens 8 --max-input-length 8", "not both"),
        ("serve --sharded false --num-shard 2", "contradicts --num-shard 2"),
        ("serve --quantize exl2", "--quantize=exl2 is not supported"),
        ("serve --speculate 17", "--speculate=17: expected a whole number from 0 to 16"),
        (
            "serve --limit hedder_limit=9",
            "--limit hedder_limit=9: there is no such limit: did you mean header_limit",
        ),
        ("serve --limit x", "there is no such limit: bodies_limit, url_limit"),
        ("serve --limit max_grammar_bytes=1048577", "expected a whole number from 1 to 1048576"),
        (
            "serve --limit max_best_of=3 --max-best-of 4",
            "give --limit max_best_of or --max-best-of, not both",
        ),
        ("serve --limit url_limit=0", "--limit url_limit=0: expected a whole number of at least 1"),
        ("serve --limit url_limit=1.5", "--limit url_limit=1.5: expected a whole number of at least 1"),
        (
            "serve --limit body_timeout_s=inf",
            "--limit body_timeout_s=inf: expected a number of at least 0.001",
        ),
        ("serve --rope-factor 2", "--rope-factor=2 is not supported"),
        ("serve --rope-scaling linear", "--rope-scaling=linear is not supported"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(line: str, words: str):
    assert words in refused(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--engine tpu-1", "--engine: 'tpu-1' is no address of an engine: expected unix:/PATH"),
        ("--engine a:1,b:1,a:1", "--engine names an engine twice"),
        (
            "--engine a:1 --max-total-tokens 9",
            "--max-total-tokens is for the engines of --engine to be started with",
        ),
        ("--engine a:1 --sharded false", "--sharded is for the engines"),
        ("--engine a:1 --lora-adapters a=/a", "--lora-adapters is for the engines"),
        ("--engine a:1 --more-models b", "--more-models is about engines that this server starts"),
        ("--engine a:1 --shard-uds-path /tmp/x", "--shard-uds-path is about"),
    ],
)
def test_what_engines_elsewhere_decide_is_refused_by_name(line: str, words: str):
    assert words in refused(f"serve {line}")


def test_engines_elsewhere_leave_the_front_its_own_options():
    settings = read(
        "serve o/m --revision main --cache-dir none --port 1", {"XLANE_ENGINE": "unix:/x,dns:///e:9"}
    )
    assert settings.run.engines == ("unix:/x", "dns:///e:9")
    assert "MAX_BATCH_SIZE is for the engines of XLANE_ENGINE" in refused(
        "serve", {"XLANE_ENGINE": "e:9", "MAX_BATCH_SIZE": "4"}
    )


def test_every_bound_without_a_flag_can_be_moved():
    reachable = {flag.to for flag in (*ALL, *BOUNDS)}
    numbers = [f.name for f in dataclasses.fields(ServerConfig) if f.type in (int, float, "int", "float")]
    assert [name for name in numbers if f"server.{name}" not in reachable] == []
    names = [bound.name for bound in BOUNDS]
    server = read("serve --limit " + ",".join(f"{name}=7" for name in names)).server
    assert {getattr(server, name) for name in names} == {7}
    assert read("serve", {"XLANE_LIMIT": "header_timeout_s=0.5"}).server.header_timeout_s == 0.5


def test_a_wrong_variable_is_named():
    assert "MAX_TOTAL_TOKENS=lots: expected a whole number" in refused("serve", {"MAX_TOTAL_TOKENS": "lots"})
    assert "QUANTIZE=exl2 is not supported" in refused("serve", {"QUANTIZE": "exl2"})


def test_a_refused_option_that_asks_for_nothing_is_fine():
    assert read("serve --ngrok false").options.notes == []


def test_sharded_false_is_one_shard():
    assert read("serve --sharded false").engine.model_parallel == 1


def test_tgi_variables_that_never_were_flags_are_noted():
    assert "PREFIX_CACHING has no meaning here" in read("serve", {"PREFIX_CACHING": "0"}).options.notes[0]


def test_the_engines_arguments_make_the_same_config():
    config = EngineConfig(
        model_id="org/m", revision="r", load_format="dummy", dtype="bfloat16", data_parallel=2, model_parallel=4,
        lanes=3, max_total_tokens=99, max_input_tokens=50, page_tokens=16, kv_bytes=10**9, memory_fraction=0.5,
        prefill_chunk_tokens=64, target_itl_ms=12.5, max_queued=0, prefix_cache_path="/kept", prefix_cache_bytes=10**8,
        kernels="xla", cache_dir=None, quantize="int4", kv_dtype="int8", lora_adapters=("a=/a", "b=/b"),
    )  # fmt: skip
    for wanted in (config, EngineConfig(model_id="demo", cache_dir="/c")):
        line = ["engine", "--progress-fd", "9", *flags.engine_arguments(wanted)]
        command, rest = choose(line)
        assert settle(command, rest, {"MAX_TOTAL_TOKENS": "7"}, {}).engine == wanted


def test_cache_dir(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert read("serve").engine.cache_dir == "/home/u/.cache/xlane"
    assert read("serve --cache-dir none").engine.cache_dir is None
    assert read("serve --cache-dir ~/x").engine.cache_dir == "/home/u/x"


def run(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def fail(settings: Settings) -> int:
        raise error

    commands = tuple(dataclasses.replace(command, run=fail) for command in COMMANDS)
    monkeypatch.setattr(cli, "COMMANDS", commands)
    return cli.run(["plan"], {})


@pytest.mark.parametrize(
    ("line", "environ", "opens"),
    [
        ("--hostname 0.0.0.0", {}, False),
        ("--hostname ::", {}, False),
        ("--hostname 192.168.1.1", {}, False),
        ("", {"HOSTNAME": "10.0.0.7"}, False),
        ("--hostname 0.0.0.0", {"API_KEY": "k"}, True),
        ("--hostname 0.0.0.0 --api-key-file keys", {}, True),
        ("--hostname 0.0.0.0 --insecure", {}, True),
        ("--hostname 0.0.0.0", {"XLANE_INSECURE": "true"}, True),
        ("", {}, True),
        ("--hostname ::1", {}, True),
        ("--hostname localhost", {}, True),
    ],
)
def test_an_open_address_takes_a_key_or_a_word(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    environ: dict[str, str],
    opens: bool,
):
    monkeypatch.setattr("xlane.server.serve.serve", lambda *configs: 0)
    assert cli.run(["serve", *line.split()], environ) == (0 if opens else 2)
    error = capsys.readouterr().err
    assert (error == "") == opens
    assert opens or "set API_KEY (or --api-key-file)" in error


@pytest.mark.parametrize("error", [PlanError("needs 3 GB, has 2 GB"), HubError("no such repository")])
def test_expected_errors_are_one_line_and_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
):
    assert run(monkeypatch, error) == 3
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_an_engine_that_keeps_dying_is_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, EngineLost("died 5 times")) == 1
    assert capsys.readouterr().err == "error: died 5 times\n"


def test_usage_is_code_2_and_interrupt_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert cli.run(["serve", "--nope"], {}) == 2
    assert capsys.readouterr().err.startswith("error: unknown option --nope")
    assert run(monkeypatch, KeyboardInterrupt()) == 130


@pytest.mark.parametrize(
    ("line", "environ", "told"),
    [
        ("serve --json-output --cuda-graphs 1", {}, ["INFO", "ERROR"]),
        ("serve", {"JSON_OUTPUT": "true"}, ["ERROR"]),
        ("serve --json-output --nope", {}, ["ERROR"]),
        ("serve --nope", {"JSON_OUTPUT": "1"}, ["ERROR"]),
        ("serve --json-output=false --nope", {"JSON_OUTPUT": "1"}, None),
    ],
)
def test_where_lines_are_json_notes_and_the_last_word_are_too(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    environ: dict[str, str],
    told: list[str] | None,
):
    def fail(*configs: object) -> int:
        raise PlanError("needs 3 GB")

    monkeypatch.setattr("xlane.server.serve.serve", fail)
    assert cli.run(line.split(), environ) == (2 if "--nope" in line else 3)
    lines = capsys.readouterr().err.splitlines()
    if told is None:
        assert lines[-1].startswith("error: unknown option")
        return
    entries = [json.loads(each) for each in lines]
    assert [entry["level"] for entry in entries] == told
    said = entries[-1]["fields"]["message"]
    assert said.startswith("unknown option --nope" if "--nope" in line else "needs 3 GB")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, ZeroDivisionError())


def test_version_and_overview(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["--version"], {}) == 0
    assert cli.run(["--help"], {}) == 0
    assert cli.run([], {}) == 2
    shown = capsys.readouterr().out
    assert shown.startswith("xlane 0.")
    assert [command.name for command in COMMANDS if command.name not in shown] == []


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_names_every_option_and_loads_nothing_heavy(command: str, tmp_path: Path):
    heavy = (
        "import sys; bad = {'jax', 'numpy', 'transformers', 'grpc', 'starlette', 'rich'} & set(sys.modules)"
    )
    code = (
        "import sys\nfrom xlane.server.cli import run\n"
        f"try: run({[*command.split(), '--help']!r}, {{}})\nexcept SystemExit as stop: assert stop.code == 0\n"
        f"{heavy}; assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    for group in choose(command.split())[0].groups.values():
        assert [flag.option for flag in group if flag.option not in done.stdout] == []


def test_who_reads_may_leave():
    line = f"{sys.executable} -m xlane.server config show | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ('model-id = "demo"\n', "")


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "xlane.server", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("xlane ")
