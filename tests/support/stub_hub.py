"""The Hub's download protocol on loopback: model info, HEAD and GET with ETag, commit and ranges, tokens, cut connections."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


@dataclass
class Repo:
    """One repository with one commit."""

    files: Mapping[str, bytes]
    revisions: tuple[str, ...] = ("main", SHA)
    private: bool = False
    gated: bool = False


@dataclass
class StubHub:
    """What is served and what was asked."""

    repos: dict[str, Repo]
    url: str = ""
    cuts: dict[str, int] = field(default_factory=dict)
    """File name -> how many more times its download breaks off half way."""
    failures: list[int] = field(default_factory=list)
    """Statuses that the next requests are answered with, instead of what they ask for."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header) in order."""

    def downloads(self, file: str) -> list[str | None]:
        """The Range headers of the GETs of one file."""
        return [
            range for method, path, range in self.requests if method == "GET" and path.endswith(f"/{file}")
        ]


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def stub_hub(repos: dict[str, Repo]) -> Iterator[StubHub]:
    """Serve repositories until the block ends."""
    hub = StubHub(repos)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StubHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.failures:
            self._send(self.hub.failures.pop(0))
        elif path == "/":
            self._send(200)
        elif path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/", 3)
            self._info(f"{owner}/{name}", rest[1].replace("%2F", "/") if rest else "main")
        else:
            owner, name, _, revision, file = path[1:].split("/", 4)
            self._file(f"{owner}/{name}", revision, file)

    def _repo(self, name: str, revision: str) -> Repo | None:
        """The repository, or None after an answer like the Hub's."""
        repo, authorization = self.hub.repos.get(name), self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and authorization is None):
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and authorization is None:
            self._send(401, {"X-Error-Code": "GatedRepo"})
        elif revision not in repo.revisions:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def _info(self, name: str, revision: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        siblings = []
        for file, content in repo.files.items():
            lfs = {"sha256": etag(content), "size": len(content), "pointerSize": 134}
            siblings.append(
                {"rfilename": file, "size": len(content), "blobId": etag(content)[:40], "lfs": lfs}
            )
        body = {
            "id": name,
            "modelId": name,
            "sha": SHA,
            "siblings": siblings,
            "private": repo.private,
            "tags": [],
        }
        self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        if file not in repo.files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
            return
        content, start = repo.files[file], 0
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.command == "GET" and self.hub.cuts.get(file, 0) > 0
        if cut:
            self.hub.cuts[file] -= 1
        self._send(206 if asked else 200, headers, content[start:], cut)

    def _send(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut
