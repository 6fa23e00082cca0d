"""HTTPS, and a certificate that is changed while it is served."""

import re
import ssl
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from xlane.server import tls
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.options import UsageError
from xlane.server.tls import certificate_of

from ..support.byte_tokenizer import ByteTokenizer
from ..support.canaries import eventually
from ..support.fake_engine import FakeEngine
from ..support.live_server import live_server

DAY_S = 24 * 3600


def certificate(directory: Path, name: str, days: int = 2) -> ServerConfig:
    """A fresh pair in `directory`, made out to localhost and signed by itself."""
    cert, key = directory / "tls.crt", directory / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", str(days),
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return ServerConfig(ssl_certfile=str(cert), ssl_keyfile=str(key))


def served(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port)).strip()


def test_it_is_served_and_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
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
                certificate(tmp_path, "second", days=9)
                second = pem.read_text().strip()
                eventually(lambda: served(server.port) == second, "the new certificate is served")
                assert "generated_text" in "".join(lines), "what ran goes on under the old one"
            assert [f"{pem} expires" in told for told in warned(caplog)] == [True] * 2, (
                "then, and at the start"
            )
            (left_s,) = re.findall(r"^xlane_tls_certificate_seconds (.+)$", client.get("/metrics").text, re.M)
            assert 8.9 < float(left_s) / DAY_S <= 9
            pem.write_text("none")
            eventually(lambda: served(server.port) == second, "the last that was right is served")
            assert client.get("/health").status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{server.port}/health")


@pytest.mark.parametrize(("days", "said"), [(15, None), (13, "expires"), (2, "has expired"), (36500, None)])
def test_one_that_ends_soon_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    days: int,
    said: str | None,
):
    ahead_s = 3 * DAY_S if said == "has expired" else 0
    monkeypatch.setattr(tls, "time", SimpleNamespace(time=lambda: time.time() + ahead_s))
    config = certificate(tmp_path, "x", days)
    told = subprocess.run(["openssl", "x509", "-enddate", "-noout", "-in", config.ssl_certfile or ""], check=True, capture_output=True, text=True)  # fmt: skip
    found = certificate_of(config)
    assert found is not None
    ends = datetime.strptime(told.stdout.strip(), "notAfter=%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
    assert found.left_s == pytest.approx((ends - datetime.now(UTC)).total_seconds() - ahead_s, abs=5)
    assert [line for line in warned(caplog) if said and said in line] == warned(caplog)
    assert len(warned(caplog)) == (said is not None)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_what_cannot_be_served_with_is_told_at_the_start(tmp_path: Path):
    config = certificate(tmp_path, "x")
    with pytest.raises(UsageError, match=r"--ssl-certfile: no certificate .*tls\.crt"):
        certificate_of(ServerConfig(ssl_certfile=config.ssl_certfile))
    with pytest.raises(UsageError, match="--ssl-keyfile needs --ssl-certfile"):
        certificate_of(ServerConfig(ssl_keyfile=config.ssl_keyfile))
    with pytest.raises(UsageError, match="none"):
        certificate_of(ServerConfig(ssl_certfile="none"))
    key = Path(config.ssl_keyfile or "")
    locked = ["openssl", "ec", "-in", key, "-aes128", "-passout", "pass:x", "-out", tmp_path / "locked"]
    subprocess.run(locked, check=True, capture_output=True)
    with pytest.raises(UsageError, match="passphrase"):
        certificate_of(ServerConfig(ssl_certfile=config.ssl_certfile, ssl_keyfile=str(tmp_path / "locked")))
    both = tmp_path / "both.pem"
    both.write_text(Path(config.ssl_certfile or "").read_text() + key.read_text())
    assert certificate_of(ServerConfig(ssl_certfile=str(both))) is not None
    assert certificate_of(ServerConfig()) is None
