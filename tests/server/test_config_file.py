"""A configuration by file: what it says arrives like what is typed, less urgent; what is wrong in it is told with its place."""

import tomllib
from pathlib import Path

import pytest

from xlane.server import cli
from xlane.server.cli import Settings, choose, settle
from xlane.server.options import UsageError


def read(line: str, **environ: str) -> Settings:
    command, rest = choose(line.split())
    return settle(command, rest, environ, {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "xlane.toml"
    path.write_text(
        'model-id = "org/m"\nport = 8080\nmax-total-tokens = 512\nmemory-fraction = 0.5\njson-output = true\n'
        'cors-allow-origin = ["http://a", "http://b"]\nmax-input-length = 100\nusage-stats = "off"\nngrok = false\n'
        '[limit]\nurl_limit = 99\nbody_timeout_s = 0.5\n'
    )  # fmt: skip
    return path


def test_a_file_sets_options_by_their_names(file: Path):
    settings = read(f"serve --config {file}")
    engine, server = settings.engine, settings.server
    assert (engine.model_id, engine.max_total_tokens, engine.max_input_tokens) == ("org/m", 512, 100)
    assert (engine.memory_fraction, settings.run.json_output) == (0.5, True)
    assert (server.port, server.cors_allow_origins) == (8080, ("http://a", "http://b"))
    assert (server.url_limit, server.body_timeout_s) == (99, 0.5)
    [note] = settings.options.notes
    assert note.startswith(f"usage-stats in {file} has no meaning here")


def test_what_is_typed_wins_then_variables_then_the_file(file: Path):
    line = f"serve --max-total-tokens 400 --config {file} --limit url_limit=7"
    settings = read(line, PORT="9090", MAX_TOTAL_TOKENS="300", MAX_INPUT_TOKENS="200")
    assert settings.server.port == 9090
    assert (settings.engine.max_total_tokens, settings.engine.max_input_tokens) == (400, 200)
    assert (settings.server.url_limit, settings.server.body_timeout_s) == (7, 0.5)
    origins = settings.options.origins
    names = ("engine.max_total_tokens", "server.port", "engine.model_id", "server.url_limit")
    assert [origins[name] for name in names] == [
        "--max-total-tokens",
        "PORT",
        f"model-id in {file}",
        "--limit url_limit",
    ]
    assert "server.host" not in origins


def test_the_variable_names_the_file_and_other_commands_take_what_they_have(file: Path):
    assert read("plan", XLANE_CONFIG=str(file)).engine.max_total_tokens == 512
    assert read("top", XLANE_CONFIG=str(file)).options.plain("url") == "http://127.0.0.1:3000"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "there is no option prot: did you mean port"),
        ("nonsense_ = 1", "there is no option nonsense_; options are named as on the command line"),
        ('config = "other.toml"', "there is no option config"),
        ("port = ", "is not TOML: Invalid value (at"),
        ('port = "http"', "port in FILE=http: expected a whole number from 0 to 65535"),
        ("port = 1.5", "port in FILE=1.5: expected a whole number"),
        ("port = true", "port in FILE: expected a number"),
        ("json-output = [true]", "json-output in FILE: expected true or false"),
        ("model-id = 2026-01-01", "model-id in FILE: expected a text in quotes"),
        ("cors-allow-origin = {}", "cors-allow-origin in FILE: expected a list"),
        ("max-input-length = 8\nmax-input-tokens = 8", "give max-input-tokens in FILE or max-input-length in FILE"),
        ("[limit]\nhedder_limit = 1", "limit in FILE hedder_limit=1: there is no such limit: did you mean header_limit"),
        ("[limit]\nurl_limit = 0", "limit in FILE url_limit=0: expected a whole number of at least 1"),
        ('rope-factor = "2"', "rope-factor in FILE=2 is not supported"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(text: str, words: str, tmp_path: Path):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read(f"serve --config {path}")
    assert words in str(caught.value).replace(str(path), "FILE")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path):
    with pytest.raises(UsageError, match=r"--config nowhere\.toml: No such file"):
        read("serve --config nowhere.toml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="bytes is not TOML"):
        read(f"serve --config {tmp_path / 'bytes'}")


def test_what_is_shown_makes_the_same_server(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = ["--config", str(file), "--cache-dir", "none", "--num-shard", "2"]
    assert cli.run(["config", "show", *line], {"API_KEY": "secret-7"}) == 0
    shown = capsys.readouterr().out
    assert "secret-7" not in shown
    assert "# api-key is set, and not shown" in shown
    again = tmp_path / "again.toml"
    again.write_text(shown)
    first, second = read(" ".join(["serve", *line])), read(f"serve --config {again}")
    assert (first.engine, first.server, first.run) == (second.engine, second.server, second.run)


def test_each_value_says_where_it_is_from(file: Path, capsys: pytest.CaptureFixture[str]):
    line = ["config", "show", "--origin", "--config", str(file), "--sharded=false"]
    assert cli.run(line, {"HOSTNAME": "::1"}) == 0
    shown = capsys.readouterr().out
    tomllib.loads(shown)
    rows = dict(row.split("  # ") for row in shown.splitlines() if "  # " in row)
    told = {name.strip(): origin for name, origin in rows.items()}
    assert told["port = 8080"] == f"port in {file}"
    assert told['hostname = "::1"'] == "HOSTNAME"
    assert told["num-shard = 1"] == "--sharded"
    assert told["url_limit = 99"] == f"limit in {file} url_limit"
    assert told["header_limit = 32768"] == "default"
