"""Where engines are, as people write it: `unix:/PATH`, `HOST:PORT`, or `dns:///NAME:PORT`, which may be many and change.

Knows names and addresses; not who listens there.
"""

import asyncio
import socket

DNS, UNIX = "dns:///", "unix:"
FORMS = f"{UNIX}/PATH, HOST:PORT or {DNS}NAME:PORT"


def check_address(address: str) -> None:
    """Raises ValueError for what is no address of an engine, with what would be one."""
    if address.startswith(UNIX):
        good = address.removeprefix(UNIX).startswith("/")
    else:
        host, _, port = address.removeprefix(DNS).rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        bracketed = len(host) == len(bare) + 2
        good = bool(bare) and "/" not in host and (bracketed or ":" not in host)
        good = good and port.isdecimal() and 0 < int(port) < 1 << 16
    if not good:
        raise ValueError(f"{address!r} is no address of an engine: expected {FORMS}")


async def resolve(name: str) -> set[str]:
    """Every `HOST:PORT` that a `dns:///NAME:PORT` has now. Raises OSError if it cannot be found out, or there is none."""
    host, _, port = name.removeprefix(DNS).rpartition(":")
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    return {
        f"[{place[0]}]:{place[1]}" if family == socket.AF_INET6 else f"{place[0]}:{place[1]}"
        for family, *_, place in found
    }
