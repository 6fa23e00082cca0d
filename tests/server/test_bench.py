"""The load generator against a small server whose timing and answers are known."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from xlane.server import bench
from xlane.server.bench import APIS, Load, Prompts, measure
from xlane.server.bench_client import Answer, Endpoint, call, exchange
from xlane.server.bench_report import Spread, summarise, table
from xlane.server.cli import run
from xlane.server.options import UsageError

PAUSE_S = 0.01


class FakeServer:
    """Counts a word as two tokens, streams tokens at a fixed pace, can be told to misbehave."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.running = self.most = 0
        self.fail = ""
        self.tokenizes = True

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        length = next(
            int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length")
        )
        body = json.loads(await reader.readexactly(length) or "null")
        self.seen.append((path, body))
        if path == "/v1/models":
            self.reply(writer, {"data": [{"id": "tiny"}]})
        elif path == "/tokenize" and self.tokenizes:
            text = body.get("inputs") or body["content"]
            self.reply(writer, [{"id": 1}] * (2 * len(text.split())))
        elif self.fail or path == "/tokenize":
            self.reply(writer, {"error": self.fail}, "500 Oh")
        else:
            self.running += 1
            self.most = max(self.most, self.running)
            await self.stream(writer, path, body)
            self.running -= 1
        writer.close()

    def reply(self, writer: asyncio.StreamWriter, value: Any, status: str = "200 OK") -> None:
        body = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    async def stream(self, writer: asyncio.StreamWriter, path: str, body: Mapping[str, Any]) -> None:
        tokens = body.get("max_tokens") or body.get("n_predict") or body["parameters"]["max_new_tokens"]
        prompt = 2 * len((body.get("prompt") or body["inputs"]).split())
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        events: list[dict[str, Any]] = [{"choices": [{"text": "a"}]} for _ in range(tokens)]
        if path == "/v1/completions":
            usage = {"prompt_tokens": prompt, "completion_tokens": tokens}
            events.append({"choices": [], "usage": usage})
        elif path == "/generate_stream":
            events[-1]["details"] = {"input_length": prompt, "generated_tokens": tokens}
        else:
            events[-1] |= {"tokens_evaluated": prompt, "tokens_predicted": tokens}
        for event in events:
            data = f"data: {json.dumps(event)}\n\n".encode()
            # Torn in two, as networks do.
            for part in (data[:9], data[9:]):
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await writer.drain()
            await asyncio.sleep(PAUSE_S)
        end = b"data: [DONE]\n\n" if path == "/v1/completions" else b": bye\n\n"
        writer.write(f"{len(end):x}\r\n".encode() + end + b"\r\n0\r\n\r\n")
        await writer.drain()


@asynccontextmanager
async def serving(fake: FakeServer) -> AsyncIterator[str]:
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.sleep(0.02)  # The last connections end.


def load(url: str, **rest: Any) -> Load:
    wanted = {
        "api": "openai",
        "prompt_tokens": 12,
        "output_tokens": 5,
        "concurrency": (2,),
        "requests": 6,
        "seed": 3,
    }
    return Load(**{"url": url, **wanted, **rest})


@pytest.mark.parametrize("api", APIS)
def test_a_closed_loop(api: str):
    fake = FakeServer()

    async def go() -> list[Any]:
        async with serving(fake) as url:
            return await measure(load(url, api=api), pytest.fail)

    (result,) = uvloop.run(go())  # As the command does: its transports differ from asyncio's.
    assert (result.requests, result.failed, result.concurrency) == (6, 0, 2)
    assert (result.prompt_tokens, result.output_tokens) == (12, 5)
    assert fake.most == 2
    assert result.tpot_ms.p50 == pytest.approx(1e3 * PAUSE_S, rel=1)
    assert result.ttft_ms.p50 < result.e2e_ms.p50
    assert result.output_tokens_per_s == pytest.approx(30 / result.seconds, rel=0.01)
    asked = [body for path, body in fake.seen if path == APIS[api].path]
    assert len(asked) == 7, "six and one to warm up"
    assert len({json.dumps(body) for body in asked}) == 7, "no prompt twice: a prefix cache would answer it"


def test_an_open_loop_does_not_wait_for_answers():
    fake = FakeServer()

    async def go() -> list[Any]:
        async with serving(fake) as url:
            return await measure(load(url, rate=500.0, requests=10, output_tokens=20), pytest.fail)

    (result,) = asyncio.run(go())
    assert (result.requests, result.failed, result.rate) == (10, 0, 500.0)
    assert fake.most > 5


def test_prompts_share_a_prefix_only_if_told():
    async def go() -> list[str]:
        async with serving(FakeServer()) as url:
            endpoint = Endpoint.parse(url, None)
            prompts = Prompts(endpoint, APIS["openai"], load(url, prompt_tokens=40, shared_prefix=10))
            return [await prompts.make() for _ in range(2)]

    one, two = asyncio.run(go())
    assert len(one.split()) == len(two.split()) == 20
    assert one.split()[:10] == two.split()[:10]
    assert one != two


def test_a_server_without_tokenize_is_told_of():
    fake, told = FakeServer(), []
    fake.tokenizes = False

    async def go() -> None:
        async with serving(fake) as url:
            await measure(load(url, requests=1), told.append)

    asyncio.run(go())
    assert "has no /tokenize" in told[0]


def test_failures_are_counted_and_told():
    fake = FakeServer()

    async def go() -> Answer:
        async with serving(fake) as url:
            endpoint = Endpoint.parse(url, "key")
            fake.fail = "no luck"
            return await exchange(endpoint, endpoint.request("/v1/completions", {"prompt": "a"}), 5)

    answer = asyncio.run(go())
    assert answer.error.startswith("HTTP 500")
    assert "no luck" in answer.error
    result = summarise([answer], APIS["openai"].counts, 1, None)
    assert (result.failed, result.output_tokens_per_s) == (1, 0)


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


def test_percentiles_by_hand():
    assert Spread.of([0.003, 0.001, 0.002]) == Spread(2.0, 2.0, 2.8, 2.98)
    assert Spread.of([]) == Spread(0, 0, 0, 0)


def test_numbers_by_hand():
    def usage(tokens: int) -> bytes:
        return json.dumps({"usage": {"prompt_tokens": 7, "completion_tokens": tokens}}).encode()

    answers = [
        Answer(sent_at=0.0, done_at=4.0, status=200, moments=[1.0, 2.0, 4.0], last_event=usage(3)),
        # Two tokens in one event count as two.
        Answer(sent_at=1.0, done_at=5.0, status=200, moments=[3.0, 5.0], last_event=usage(3)),
    ]
    result = summarise(answers, APIS["openai"].counts, 2, None)
    assert (result.seconds, result.output_tokens_per_s, result.total_tokens_per_s) == (5.0, 1.2, 4.0)
    assert result.ttft_ms.mean == 1500
    assert result.tpot_ms.mean == pytest.approx(1e3 * (1.5 + 1.0) / 2)
    assert result.itl_ms.mean == pytest.approx(1e3 * 5 / 3, abs=0.001)
    assert result.e2e_ms.p50 == 4000
    assert "2 clients" in table([result])


def test_wrong_options():
    common = {"url": "http://x", "api": "openai", "prompt_tokens": 4, "output_tokens": 4, "seed": 1}
    with pytest.raises(UsageError, match="--shared-prefix 9"):
        bench.bench({**common, "concurrency": (1,), "shared_prefix": 9})


def test_the_command_ends_in_one_json_line(capsys: pytest.CaptureFixture[str]):
    assert run(["bench", "serve", "--url", "http://127.0.0.1:9", "--requests", "1"], {}) == 3
    assert "cannot connect" in capsys.readouterr().err
