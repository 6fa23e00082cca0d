"""The certificate HTTPS is served with, and a newer one when there is one. Knows files and handshakes; no HTTP."""

import asyncio
import logging
import ssl

from .config import ServerConfig
from .files import LOOK_EVERY_S, Watched
from .options import UsageError

_logger = logging.getLogger("xlane.tls")


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """What to serve with, or None for plain HTTP. Raises UsageError."""
    if config.ssl_certfile is None:
        if config.ssl_keyfile is not None:
            raise UsageError("--ssl-keyfile needs --ssl-certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        _load(context, config)
    except OSError as error:  # ssl.SSLError is one.
        files = " and ".join(paths(config))
        raise UsageError(
            f"--ssl-certfile: no certificate and its key can be read from {files}: {error}"
        ) from None
    return context


async def renew(context: ssl.SSLContext, config: ServerConfig) -> None:
    """Take a new certificate whenever the files change, for connections that begin then. Runs until cancelled."""
    watched = Watched(paths(config))
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        if not watched.changed():
            continue
        try:
            # A pair that does not fit is told of before it is taken: this would leave half of it behind.
            _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config)
            _load(context, config)
            _logger.info("a new certificate was read from %s", config.ssl_certfile)
        except OSError as error:
            _logger.error("the certificate stays as it was: %s: %s", config.ssl_certfile, error)


def paths(config: ServerConfig) -> list[str]:
    """The files it is made of; one may hold both."""
    return [path for path in (config.ssl_certfile, config.ssl_keyfile) if path is not None]


def _load(context: ssl.SSLContext, config: ServerConfig) -> None:
    assert config.ssl_certfile is not None
    # A passphrase would be asked for on a terminal that may not be there.
    context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)


def _no_password() -> str:
    raise ssl.SSLError("the key has a passphrase; give one without")
