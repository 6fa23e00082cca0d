"""Messages to an engine that no client of ours would send: they end their own call, and nothing else."""

from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from xlane.engine.rpc_server import MAX_MESSAGE_BYTES

from .test_seam import Served, connect, ids_of, make_request, served

__all__ = ["served"]

pytestmark = pytest.mark.anyio


def nested(levels: int) -> bytes:
    """A message in a message in a message: field 1 each."""
    inner = b""
    for _ in range(levels):
        size = len(inner)
        inner = (
            b"\x0a"
            + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21])
            + inner
        )
    return inner


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\0" * (MAX_MESSAGE_BYTES + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (nested(100_000), grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0b" * 100_000, grpc.StatusCode.INVALID_ARGUMENT),  # groups that begin and never end
    ],
    ids=["large", "deep", "endless"],
)
async def test_a_message_without_bounds_ends_its_own_call_alone(
    served: Served, tmp_path: Path, message: bytes, code: grpc.StatusCode
):
    async with connect("unix", served.core, tmp_path) as client:
        running = make_request(max_tokens=40)
        outputs = client.submit(running)
        first = await anext(outputs)
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/engine.sock") as channel:
            call = channel.stream_stream("/xlane.engine.v1.Engine/Generate")()
            with suppress(grpc.aio.AioRpcError):
                await call.write(message)
                await call.done_writing()
                await call.read()
            assert await call.code() is code
        rest = [output async for output in outputs]
        assert ids_of([first, *rest]) == served.expected(running)
