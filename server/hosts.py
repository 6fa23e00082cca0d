"""By which names this server may be called. A page of another site can have its name lead to 127.0.0.1 (DNS rebinding)
and would then ask as if it were ours; only the Host header tells. Knows names; no sockets, no keys.
"""

import ipaddress
import socket

from .config import ServerConfig

LOCAL_ENDINGS = (".localhost", ".local", ".internal")
"""Names that nobody else can register."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_to_all(config: ServerConfig) -> bool:
    """Whether strangers could come in, and nobody said that they may."""
    return not (config.keyed or config.insecure or is_loopback(config.host))


class Hosts:
    """Who is called by a stranger's name. Only a server on loopback that asks for no key has to ask that: elsewhere a
    browser has no key to send, or the network decides who comes in."""

    def __init__(self, config: ServerConfig) -> None:
        self._checks = is_loopback(config.host) and not config.keyed and not config.insecure
        self._own = {"localhost", socket.gethostname().lower()}

    def stranger(self, header: bytes) -> str:
        """Why a request with this Host header is refused; empty if it is not."""
        if not self._checks:
            return ""
        name = header.decode("latin-1").strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        name = name.removesuffix(".")
        if name in self._own or name.endswith(LOCAL_ENDINGS) or _is_address(name):
            return ""
        return (
            f"The host {name[:100]!r} is not this machine, whose pages alone may use a server without a key; "
            "set --api-key, or --insecure to take any name"
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
