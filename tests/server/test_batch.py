"""`xlane batch` over the engine of hand arithmetic: asked through a running server and with a model of its own."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from xlane.engine import Request, StepOutput
from xlane.server import batch, cli
from xlane.server.backend import Backend
from xlane.server.batch_lines import Question, Reply

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine
from ..support.live_server import live_server
from .test_llm import Standing

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": "q"}], "max_tokens": 4, "temperature": 0},
    COMPLETION: {"prompt": "xy", "max_tokens": 4, "temperature": 0},
    RESPONSE: {"input": "q", "max_output_tokens": 4, "temperature": 0},
}
CHANGES = ("id", "created", "created_at", "completed_at", "system_fingerprint")
"""Fields that differ between two answers to one request."""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeEngine]]:
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend) as server:
        yield server.url, engine


@pytest.fixture(params=["own", "url"])
def asked(
    request: pytest.FixtureRequest, served: tuple[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], FakeEngine]:
    """Arguments that say whom to ask, and the engine that answers."""
    url, engine = served
    engine.submitted.clear()
    if request.param == "url":
        return ["--url", url], engine
    monkeypatch.setattr(batch, "LoadedModel", Standing)
    monkeypatch.setattr(Standing, "engine", engine)
    return [], engine


def line(custom_id: str, url: str = COMPLETION, **fields: Any) -> str:
    body = {**BODIES.get(url, {}), **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def run(folder: Path, lines: list[str], *arguments: str) -> list[dict[str, Any]]:
    (folder / "in").write_text("".join(f"{line}\n" for line in lines))
    assert cli.run(["batch", "-i", str(folder / "in"), "-o", str(folder / "out"), *arguments], {}) == 0
    return [json.loads(answer) for answer in (folder / "out").read_text().splitlines()]


def settled(value: Any) -> Any:
    """Without what changes from answer to answer."""
    if isinstance(value, Mapping):
        return {name: settled(inner) for name, inner in value.items() if name not in CHANGES}
    return [settled(inner) for inner in value] if isinstance(value, list) else value


def test_each_line_gets_what_a_client_gets(
    asked: tuple[list[str], FakeEngine], served: tuple[str, FakeEngine], tmp_path: Path
):
    answers = run(tmp_path, [line(url, url) for url in BODIES], *asked[0])
    assert {answer["custom_id"] for answer in answers} == set(BODIES)
    for answer in answers:
        url = answer["custom_id"]
        direct = httpx.post(served[0] + url, json=BODIES[url])
        assert direct.status_code == 200
        assert settled(answer["response"]["body"]) == settled(direct.json())
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"]
        assert answer["error"] is None
    assert len({answer["id"] for answer in answers}) == len(BODIES)


def test_a_bad_line_is_an_error_line_and_not_the_end(asked: tuple[list[str], FakeEngine], tmp_path: Path):
    lines = [
        line("first"), "{", '{"url": "/v1/completions", "body": {}}', line("shape").replace('"body": {', '"body": 1, "b": {'),
        line("embeds", "/v1/embeddings"), line("gets").replace("POST", "GET"), line("streams", stream=True), "",
        line("first"), line("other", model="gpt-4"), line("last"),
    ]  # fmt: skip
    answers = run(tmp_path, lines, *asked[0])
    good = {a["custom_id"]: a["response"]["status_code"] for a in answers if a["error"] is None}
    assert good == {"first": 200, "other": 404, "last": 200}
    other = next(answer for answer in answers if answer["custom_id"] == "other")
    assert other["response"]["body"]["error"]["code"] == "model_not_found"
    bad = {answer["error"]["line"]: answer for answer in answers if answer["error"] is not None}
    assert {number: answer["custom_id"] for number, answer in bad.items()} == {
        2: None, 3: None, 4: "shape", 5: "embeds", 6: "gets", 7: "streams", 9: None,
    }  # fmt: skip
    assert "POST /v1/embeddings is not possible" in bad[5]["error"]["message"]
    assert "that of line 1 already" in bad[9]["error"]["message"]
    assert all(answer["response"] is None for answer in bad.values())
    assert run(tmp_path, lines, *asked[0]) == answers, "a second run has nothing to do"


def test_a_run_goes_on_where_the_one_before_was_cut_off(asked: tuple[list[str], FakeEngine], tmp_path: Path):
    lines = [line(f"id-{number}", prompt=chr(ord("a") + number)) for number in range(6)]
    run(tmp_path, lines, "--concurrency", "1", *asked[0])
    whole = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(b"".join(whole[:2]) + whole[2][:30])
    asked[1].submitted.clear()
    answers = run(tmp_path, lines, *asked[0])
    assert [request.prompt_ids[-1] for request in asked[1].submitted] == [*b"cdef"]
    texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"][0] for answer in answers}
    assert texts == {f"id-{number}": chr(ord("b") + number) for number in range(6)}
    assert len(answers) == 6


@pytest.mark.parametrize(
    "text",
    [
        line("a"),
        "notes",
        f"{line('a')}\n",
        '{"id":"batch_req_0","custom_id":"a"}\nnotes\n{"id":"batch',
        '{"id":"batch_req_0","custom_id":"a"}\nnotes',
    ],
)
def test_a_file_that_is_no_output_is_left_as_it_is(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").write_text(line("a") + "\n")
    (tmp_path / "out").write_text(text)
    assert cli.run(["batch", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")], {}) == 2
    assert "out is no output of a batch, line" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == text


def test_nothing_is_touched_where_input_and_output_are_confused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    told = tmp_path / "told"
    told.write_text(line("a"))
    (tmp_path / "same").symlink_to(told)
    for other, said in (
        ("none", "none: No such file"),
        ("told", "is the input too"),
        ("same", "is the input too"),
    ):
        assert cli.run(["batch", "-i", str(tmp_path / other), "-o", str(told)], {}) == 2
        assert said in capsys.readouterr().err
    assert told.read_text() == line("a")


@pytest.mark.parametrize("cut", [1, 12, 30])
def test_a_first_line_that_was_cut_off_is_answered_again(
    cut: int, asked: tuple[list[str], FakeEngine], tmp_path: Path
):
    run(tmp_path, [line("a")], *asked[0])
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole[:cut])
    assert [answer["custom_id"] for answer in run(tmp_path, [line("a")], *asked[0])] == ["a"]


def test_only_so_many_are_asked_at_once(
    asked: tuple[list[str], FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments, engine = asked
    active: list[int] = []
    submit = engine.submit

    def counted(request: Request) -> AsyncIterator[StepOutput]:
        active.append(engine.active + 1)
        return submit(request)

    monkeypatch.setattr(engine, "submit", counted)
    monkeypatch.setattr(engine, "delay_s", 0.001)
    run(tmp_path, [line(str(number)) for number in range(20)], "--concurrency", "3", *arguments)
    assert (len(active), max(active)) == (20, 3)


def test_what_a_server_has_no_room_for_is_asked_again():
    replies = [
        Reply(429, {"retry-after": "0"}, b""),
        Reply(503, {"retry-after": "0"}, b""),
        Reply(200, {}, b"{}"),
    ]

    async def ask(path: str, body: Mapping[str, Any]) -> Reply:
        return replies.pop(0)

    assert asyncio.run(batch._patiently(ask, Question("id", COMPLETION, {}))).status == 200
    replies = [Reply(429, {}, b""), Reply(200, {}, b"{}")]
    assert asyncio.run(batch._patiently(ask, Question("id", COMPLETION, {}))).status == 429


def test_a_server_that_is_not_there_ends_the_run_and_takes_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").write_text(line("a") + "\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        paths = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
        assert cli.run(["batch", *paths, "--url", url], {}) == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-i", "x"], "give --input FILE, the requests, and --output FILE"),
        (["-i", "none", "-o", "out"], "none: No such file or directory"),
        (
            ["-i", "x", "-o", "y", "--url", "http://h", "--dtype", "bfloat16"],
            "--dtype has no meaning beside it",
        ),
        (
            [
                "-i",
                "x",
                "-o",
                "y",
                "--url",
                "ftp://h",
            ],
            "ftp://h is no http URL",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("")
    assert cli.run(["batch", *arguments], {}) == 2
    assert said in capsys.readouterr().err
