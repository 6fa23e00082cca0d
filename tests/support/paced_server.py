"""An HTTP server of three APIs that counts a word as two tokens, streams tokens at a known pace, and can be told to misbehave."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class PacedServer:
    """Set the fields before a request; read the lists after it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.running = self.most = 0
        self.first_s, self.pause_s = 0.0, 0.01
        """Before the first token, and after each."""
        self.fail = ""
        """Answer with 500 and this text."""
        self.break_after: int | None = None
        """An error event comes after so many tokens."""
        self.at_most: int | None = None
        """No answer is of more tokens, whatever was asked for."""
        self.tokenizes = True

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
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
        tokens = min(tokens, self.at_most or tokens)
        text = body.get("prompt") or body.get("inputs") or body["messages"][-1]["content"]
        writer.write(STREAM)
        await asyncio.sleep(0 if path.endswith("/chat/completions") else self.first_s)
        for number, event in enumerate(events(path, 2 * len(text.split()), tokens)):
            if number == self.break_after:
                event = {"error": {"message": "the engine is gone"}}
            await send(writer, f"data: {json.dumps(event)}\n\n".encode())
            if "error" in event:
                break
            chat_opens = number == 0 and path.endswith("/chat/completions")
            await asyncio.sleep(self.first_s if chat_opens else self.pause_s)
        await send(writer, b"data: [DONE]\n\n" if path.startswith("/v1/") else b": bye\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def events(path: str, prompt: int, tokens: int) -> list[dict[str, Any]]:
    """The events of one answer, as servers of that API send them."""
    usage = {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}}
    if path == "/v1/completions":
        said = [{"choices": [{"text": "a", "finish_reason": None}]} for _ in range(tokens)]
        return [*said, {"choices": [{"text": "", "finish_reason": "length"}]}, usage]
    if path == "/v1/chat/completions":
        # A first chunk without text is sent at once, long before there is a token.
        opening = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        said = [{"choices": [{"delta": {"content": "a"}}]} for _ in range(tokens)]
        return [opening, *said, {"choices": [{"delta": {}, "finish_reason": "length"}]}, usage]
    if path == "/generate_stream":
        said = [{"token": {"text": "a"}, "details": None} for _ in range(tokens)]
        said[-1]["details"] = {"input_length": prompt, "generated_tokens": tokens}
        return said
    said = [{"content": "a", "stop": False} for _ in range(tokens)]
    return [*said, {"content": "", "stop": True, "tokens_evaluated": prompt, "tokens_predicted": tokens}]


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """One event, torn in two, as networks do."""
    for part in (data[:9], data[9:]):
        writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        await writer.drain()


@asynccontextmanager
async def serving(paced: PacedServer) -> AsyncIterator[str]:
    """Serve on a free port; its URL."""
    server = await asyncio.start_server(paced.handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.sleep(0.02)  # The last connections end.
