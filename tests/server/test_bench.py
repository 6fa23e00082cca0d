"""The load generator against a server whose pace and answers are known."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.support.paced_server import PacedServer, serving
from xlane.server.bench import Load, load_of, measure
from xlane.server.bench_api import APIS, merged
from xlane.server.bench_client import Answer, Endpoint, call, exchange
from xlane.server.bench_report import Result
from xlane.server.cli import run
from xlane.server.options import UsageError


def load(url: str, **rest: Any) -> Load:
    wanted = {"api": "openai", "prompt_tokens": 12, "output_tokens": 5, "requests": 6, "seed": 3}
    if "rate" not in rest:
        wanted["concurrency"] = (2,)
    return load_of({"url": url, **wanted, **rest})


def measured(paced: PacedServer, **rest: Any) -> list[Result]:
    async def go() -> list[Result]:
        async with serving(paced) as url:
            return await measure(load(url, **rest), pytest.fail)

    return uvloop.run(go())  # As the command does: its transports differ from asyncio's.


@pytest.mark.parametrize("api", APIS)
def test_a_closed_loop(api: str):
    paced = PacedServer()
    paced.first_s = 0.03
    (result,) = measured(paced, api=api)
    assert (result.requests, result.failed, result.short, result.concurrency) == (6, 0, 0, 2)
    assert (result.prompt_tokens, result.output_tokens) == (12, 5)
    assert paced.most == 2
    assert result.output_tokens_per_s == pytest.approx(30 / result.seconds, rel=0.01)
    assert result.requests_per_s == pytest.approx(6 / result.seconds, rel=0.01)
    # The server waits at least so long, and a busy machine only ever adds to it.
    assert result.ttft_ms.p50 > 29
    assert result.e2e_ms.p50 > 29 + 4 * 9
    asked = [body for path, body in paced.seen if path == APIS[api].path]
    assert len(asked) == 7, "six and one to warm up"
    assert len({json.dumps(body) for body in asked}) == 7, "no prompt twice: a prefix cache would answer it"


def test_an_open_loop_does_not_wait_for_answers():
    paced = PacedServer()
    slow, quick = measured(paced, rate=(400.0, 500.0), requests=10, output_tokens=20)
    assert [(r.requests, r.failed, r.rate) for r in (slow, quick)] == [(10, 0, 400.0), (10, 0, 500.0)]
    assert paced.most > 5


def test_each_concurrency_is_a_run():
    assert [r.concurrency for r in measured(PacedServer(), concurrency=(1, 3), requests=3)] == [1, 3]


def test_extra_fields_go_into_every_request():
    paced = PacedServer()
    measured(paced, api="tgi", requests=2, extra_body='{"parameters": {"seed": 1}, "user": "x"}')
    bodies = [body for path, body in paced.seen if path == "/generate_stream"]
    assert [body["user"] for body in bodies] == ["x"] * 3
    assert bodies[0]["parameters"] == {"max_new_tokens": 5, "details": True, "seed": 1}


@pytest.mark.parametrize(
    ("body", "extra", "both"),
    [  # From RFC 7396's own examples.
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": "c"}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ({"a": [1, 2]}, {"a": ["c"]}, {"a": ["c"]}),
    ],
)
def test_extra_fields_are_a_merge_patch(body: dict, extra: dict, both: dict):
    assert merged(body, extra) == both


def test_a_server_without_tokenize_is_told_of():
    paced, told = PacedServer(), []
    paced.tokenizes = False

    async def go() -> None:
        async with serving(paced) as url:
            await measure(load(url, requests=1), told.append)

    asyncio.run(go())
    assert "has no /tokenize" in told[0]


def test_an_error_amid_a_stream_is_a_failure_and_not_a_token():
    paced = PacedServer()
    paced.break_after = 3
    (result,) = measured(paced, warmup=0, slo=("e2e_ms=100000",))
    assert (result.failed, result.errors) == (6, {"error event": 6})
    assert "the engine is gone" in result.first_error
    assert (result.output_tokens_per_s, result.within_slo) == (0, 0)


def test_shorter_answers_than_asked_for_are_counted():
    paced = PacedServer()
    paced.at_most = 3
    (result,) = measured(paced)
    assert (result.short, result.failed, result.output_tokens) == (6, 0, 3)


def test_goodput_counts_what_kept_to_the_slo():
    paced = PacedServer()
    paced.first_s = 0.03
    (missed,) = measured(paced, slo=("ttft_ms=20",))
    (kept,) = measured(paced, slo=("ttft_ms=60000", "itl_ms=60000"))
    assert (missed.within_slo, missed.goodput_requests_per_s) == (0, 0)
    assert (kept.within_slo, kept.goodput_requests_per_s) == (6, kept.requests_per_s)


def test_a_failure_says_what_the_server_said():
    paced = PacedServer()
    paced.fail = "no luck"

    async def go() -> Answer:
        async with serving(paced) as url:
            endpoint = Endpoint.parse(url, "key")
            return await exchange(endpoint, endpoint.request("/v1/completions", {"prompt": "a"}), 5)

    answer = asyncio.run(go())
    assert answer.error.startswith("HTTP 500")
    assert "no luck" in answer.error


def test_a_silent_server_and_a_closed_port():
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def go() -> tuple[Answer, int]:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            endpoint = Endpoint.parse(f"http://127.0.0.1:{port}", None)
            answer = await exchange(endpoint, endpoint.request("/x"), 0.1)
            await asyncio.sleep(0.05)  # The server sees that we are gone.
            return answer, port

    answer, port = asyncio.run(go())
    assert "no complete answer in 0.1 s" in answer.error
    with pytest.raises(ConnectionError, match="cannot connect"):
        asyncio.run(call(Endpoint.parse(f"http://127.0.0.1:{port}", None), "/v1/models"))


def test_a_url_may_have_openais_version():
    endpoint = Endpoint.parse("http://host:8000/proxy/v1/", None)
    assert endpoint.request("/v1/models").startswith(b"GET /proxy/v1/models HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shared_prefix": 12}, "--shared-prefix 12 must be less than the shortest prompt, 12"),
        ({"rate": (1.0,), "concurrency": (1,)}, "--rate or --concurrency, not both"),
        ({"workload": "x.jsonl"}, "--workload has its own lengths"),
        ({"extra_body": "[]"}, r"--extra-body \[\]: expected a JSON object"),
        ({"extra_body": "{"}, "--extra-body {: "),
        ({"slo": ("speed=1",)}, "--slo speed=1: expected each of ttft_ms, tpot_ms, itl_ms, e2e_ms once"),
        ({"slo": ("itl_ms=5", "itl_ms=6")}, "--slo itl_ms=6: expected"),
        ({"slo": ("itl_ms=0",)}, "--slo itl_ms=0: expected"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(changes: dict[str, Any], why: str):
    with pytest.raises(UsageError, match=why):
        load("http://x", **changes)


@pytest.fixture
def url() -> Iterator[str]:
    """A paced server in a thread, for the command."""
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    urls: list[str] = []

    async def main() -> None:
        async with serving(PacedServer()) as at:
            urls.append(at)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    started.wait(10)
    yield urls[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def test_the_command_prints_a_table_and_one_json_line_last(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plot = tmp_path / "plot.png"
    argv = f"bench serve --url {url} --concurrency 1,2 --requests 4 --prompt-tokens 12 --output-tokens 4"
    words = [*argv.split(), "--slo", "ttft_ms=60000,itl_ms=60000", "--plot", str(plot), "--api-key", "secret"]
    assert run(words, {}) == 0
    written = capsys.readouterr()
    *shown, last = written.out.splitlines()
    counts = [line.partition(" in ")[0] for line in written.err.splitlines()]
    assert counts == [f"{clients} clients: {done}/4" for clients in (1, 2) for done in (0, 4)]
    assert [line.split()[:3] for line in shown if "clients" in line] == [
        ["1", "clients", "4"],
        ["2", "clients", "4"],
    ]
    told = json.loads(last)
    assert "secret" not in last
    assert (told["load"]["prompt_tokens"], told["load"]["output_tokens"]) == (12, 4)
    assert [(r["concurrency"], r["within_slo"], r["output_tokens"]) for r in told["runs"]] == [
        (1, 4, 4),
        (2, 4, 4),
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_json_alone_is_one_line(url: str, capsys: pytest.CaptureFixture[str]):
    assert run(f"bench serve --url {url} --rate 200 --requests 3 --json".split(), {}) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["runs"][0]["rate"] == 200


def test_a_server_that_is_not_there_is_one_line_and_code_3(capsys: pytest.CaptureFixture[str]):
    assert run(["bench", "serve", "--url", "http://127.0.0.1:9", "--requests", "1"], {}) == 3
    assert "cannot connect" in capsys.readouterr().err
