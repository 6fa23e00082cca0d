"""A running server, as the terminal's commands ask it: one question, one answer, or a stream of events. Knows no terminal."""

import json
import socket
from collections.abc import Callable, Generator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from .options import UsageError

TIMEOUT_S = 600.0
"""Longest silence of a server that works: a long prompt waits for its turn."""


class RemoteError(Exception):
    """What the server, or the way to it, said instead of an answer."""


class Remote:
    """One server. Each question has a connection of its own, so leaving an answer ends it there too."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises UsageError for what is no URL."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url={url}: expected http://HOST:PORT")
        self.url = parts.geturl().rstrip("/").removesuffix("/v1")
        self._connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        """The JSON of an answer. Raises RemoteError."""
        connection, response = self._ask("GET", path, None)
        try:
            return json.loads(response.read())
        except (OSError, HTTPException, ValueError) as error:
            raise RemoteError(f"{self.url}{path}: {error}") from error
        finally:
            connection.close()

    def stream(
        self, path: str, body: dict[str, Any], told: Callable[[str], None] = lambda word: None
    ) -> Generator[dict[str, Any], None, None]:
        """The events of an answer as they come; closing the generator ends it. What it waits for is told, when it changes. Raises RemoteError."""
        connection, response = self._ask("POST", path, json.dumps(body).encode())
        last = ""
        try:
            for line in response:
                if line.startswith(b": ") and (word := line[2:].decode().strip()) != last:
                    told(last := word)
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RemoteError(_message(event))
                yield event
        except (OSError, HTTPException, ValueError) as error:
            raise RemoteError(f"the stream broke off: {error}") from error
        finally:
            response.close()
            connection.close()

    def _ask(self, method: str, path: str, body: bytes | None) -> tuple[HTTPConnection, HTTPResponse]:
        connection = self._connect(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, self._prefix + path, body, self._headers)
            response = connection.getresponse()
            if response.status == 200:
                return connection, response
            text = _message(json.loads(response.read()))
        except ValueError:
            text = f"{self.url}{path} answered with no JSON"
        except (OSError, HTTPException, socket.gaierror) as error:
            text = f"{self.url} does not answer: {error} (start one with `xlane serve`, or give --url)"
        connection.close()
        raise RemoteError(text)


def _message(body: Any) -> str:
    """What an error says, in any of the server's shapes."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)
