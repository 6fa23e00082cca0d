"""Asking an app of this process, without a socket: one POST, one whole answer. Knows ASGI; not what is asked."""

import asyncio
from collections.abc import Mapping, MutableMapping
from typing import Any

import orjson
from starlette.types import ASGIApp

from .batch_lines import Reply


async def post(app: ASGIApp, path: str, body: Mapping[str, Any]) -> Reply:
    """What the app answers to JSON."""
    told = False
    status, headers, parts = 500, dict[str, str](), list[bytes]()

    async def receive() -> dict[str, Any]:
        nonlocal told
        if told:
            await asyncio.Event().wait()  # nobody leaves before the answer
        told = True
        return {"type": "http.request", "body": orjson.dumps(body), "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return Reply(status, headers, b"".join(parts))
