"""The certificate HTTPS is served with, and a newer one when there is one. Knows files and handshakes; no HTTP."""

import asyncio
import logging
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from .config import ServerConfig
from .files import LOOK_EVERY_S, Watched
from .options import UsageError

_logger = logging.getLogger("xlane.tls")

WARN_S = 14 * 24 * 3600.0
"""How long before its end a certificate is warned of."""
_VERSION, _UTC_TIME = 0xA0, 0x17
"""Tags in a certificate."""
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class Certificate:
    """The one that connections are served with, now. Who it is made out to, and by whom, is the clients' matter."""

    def __init__(self, config: ServerConfig) -> None:
        """Read it. Raises UsageError."""
        self._config = config
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        """What a server serves with; never another one."""
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._expires_s = 0.0
        """Unix time."""
        try:
            self._load()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError.
            files = " and ".join(paths(config))
            raise UsageError(
                f"--ssl-certfile: no certificate and its key can be read from {files}: {error}"
            ) from None

    @property
    def left_s(self) -> float:
        """How much longer it is valid; negative when it is not any more."""
        return self._expires_s - time.time()

    async def renew(self) -> None:
        """Take a new one whenever the files change, for connections that begin then. Runs until cancelled."""
        watched = Watched(paths(self._config))
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not watched.changed():
                continue
            try:
                self._load()
                _logger.info("a new certificate was read from %s", self._config.ssl_certfile)
            except (OSError, ValueError) as error:
                _logger.error("the certificate stays as it was: %s: %s", self._config.ssl_certfile, error)

    def _load(self) -> None:
        """Raises OSError, ValueError; then all is as it was."""
        assert self._config.ssl_certfile is not None
        files = self._config.ssl_certfile, self._config.ssl_keyfile
        expires_s = _expiry_s(Path(files[0]).read_text(errors="replace"))
        # A pair that does not fit is told of before it is taken: this would leave half of it behind.
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
            # A passphrase would be asked for on a terminal that may not be there.
            context.load_cert_chain(*files, password=_no_password)
        self._expires_s = expires_s
        if self.left_s < WARN_S:
            at = datetime.fromtimestamp(self._expires_s, UTC).isoformat(" ")
            how = "expires" if self.left_s > 0 else "has expired: clients refuse it"
            _logger.warning("the certificate in %s %s (%s); put a new one there", files[0], how, at)


def certificate_of(config: ServerConfig) -> Certificate | None:
    """What to serve with, or None for plain HTTP. Raises UsageError."""
    if config.ssl_certfile is None:
        if config.ssl_keyfile is not None:
            raise UsageError("--ssl-keyfile needs --ssl-certfile")
        return None
    return Certificate(config)


def paths(config: ServerConfig) -> list[str]:
    """The files it is made of; one may hold both."""
    return [path for path in (config.ssl_certfile, config.ssl_keyfile) if path is not None]


def _no_password() -> str:
    raise ssl.SSLError("the key has a passphrase; give one without")


def _expiry_s(pem: str) -> float:
    """When the first certificate of a file ends, Unix time: of several the others sign it. Python reads a certificate's fields
    only where somebody else shows it, so this looks for the one. Raises ValueError."""
    begin = pem.find(_BEGIN)
    der = ssl.PEM_cert_to_DER_cert(pem[begin : pem.find(_END, begin) + len(_END)])
    ((_, certificate),) = _values(der)
    _, body = next(_values(certificate))
    fields = [content for tag, content in _values(body) if tag != _VERSION]
    _serial, _algorithm, _issuer, validity, *_ = fields
    _, (tag, until) = _values(validity)
    text = until.decode("ascii")
    if tag == _UTC_TIME:  # two digits of the year, of which half is the last century's (RFC 5280)
        text = ("19" if text >= "50" else "20") + text
    return datetime.strptime(f"{text}+0000", "%Y%m%d%H%M%SZ%z").timestamp()


def _values(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each value in a row of them."""
    at = 0
    while at + 1 < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            size, at = int.from_bytes(der[at : at + (size & 0x7F)]), at + (size & 0x7F)
        yield tag, der[at : at + size]
        at += size
