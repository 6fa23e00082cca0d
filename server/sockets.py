"""The address a server listens on. Knows sockets; nothing of what is said over them."""

import socket

from .config import ServerConfig


def bind(config: ServerConfig) -> socket.socket:
    """Take the address before anything slow is started, so that a busy port is known at once. Raises OSError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((config.host, config.port))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def port_of(sock: socket.socket) -> int:
    """The port a socket is bound to; not the configured one if that was 0."""
    return sock.getsockname()[1]
