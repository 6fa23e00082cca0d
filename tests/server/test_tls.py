"""HTTPS, and a certificate that is changed while it is served."""

import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from xlane.server import tls
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.options import UsageError
from xlane.server.tls import tls_context

from ..support.byte_tokenizer import ByteTokenizer
from ..support.canaries import eventually
from ..support.fake_engine import FakeEngine
from ..support.live_server import live_server


def certificate(directory: Path, name: str) -> ServerConfig:
    """A fresh pair in `directory`, made out to localhost and signed by itself."""
    cert, key = directory / "tls.crt", directory / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return ServerConfig(ssl_certfile=str(cert), ssl_keyfile=str(key))


def served(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port)).strip()


def test_it_is_served_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("xlane.server.files.LOOK_EVERY_S", 0.0)
    config = certificate(tmp_path, "first")
    pem = Path(config.ssl_certfile or "")
    engine, backend = FakeEngine(delay_s=0.01), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, config) as server:
        url = f"https://127.0.0.1:{server.port}"
        trusted = ssl.create_default_context(cafile=str(pem))
        with httpx.Client(base_url=url, verify=trusted) as client:
            body = {"inputs": "a", "parameters": {"max_new_tokens": 99}}
            with client.stream("POST", "/generate_stream", json=body) as running:
                lines = running.iter_lines()
                next(lines)
                certificate(tmp_path, "second")
                second = pem.read_text().strip()
                eventually(lambda: served(server.port) == second, "the new certificate is served")
                assert "generated_text" in "".join(lines), "what ran goes on under the old one"
            pem.write_text("none")
            eventually(lambda: served(server.port) == second, "the last that was right is served")
            assert client.get("/health").status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{server.port}/health")


def test_what_cannot_be_served_with_is_told_at_the_start(tmp_path: Path):
    config = certificate(tmp_path, "x")
    with pytest.raises(UsageError, match=r"--ssl-certfile: no certificate .*tls\.crt"):
        tls_context(ServerConfig(ssl_certfile=config.ssl_certfile))
    with pytest.raises(UsageError, match="--ssl-keyfile needs --ssl-certfile"):
        tls_context(ServerConfig(ssl_keyfile=config.ssl_keyfile))
    with pytest.raises(UsageError, match="none"):
        tls_context(ServerConfig(ssl_certfile="none"))
    key = Path(config.ssl_keyfile or "")
    locked = ["openssl", "ec", "-in", key, "-aes128", "-passout", "pass:x", "-out", tmp_path / "locked"]
    subprocess.run(locked, check=True, capture_output=True)
    with pytest.raises(UsageError, match="passphrase"):
        tls_context(ServerConfig(ssl_certfile=config.ssl_certfile, ssl_keyfile=str(tmp_path / "locked")))
    both = tmp_path / "both.pem"
    both.write_text(Path(config.ssl_certfile or "").read_text() + key.read_text())
    assert tls_context(ServerConfig(ssl_certfile=str(both))) is not None
    assert tls_context(ServerConfig()) is None
