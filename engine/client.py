"""The client seam: all that the rest of the world may ask of an engine, whether it lives here or elsewhere.

Implementations: `local.LocalClient` (an engine in this process), `rpc_client.RpcClient` (another process over gRPC),
`replay.ReplayingClient` (wraps either and survives the loss of an engine), which all pass the same tests, and
`replicas.Replicas` (several engines; it tells of their loss what one engine would not).
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from .request import EngineInfo, EngineStats, Request, StepOutput


class EngineClient(Protocol):
    """An engine as its users see it. All methods are called from one asyncio event loop."""

    def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Run a request. Closing the iterator (`aclose`) cancels it and frees its lane within two steps.

        Raises, on first iteration: InvalidRequest, Overloaded, EngineStopped.
        Raises, while running: RequestFailed, DeadlineExceeded, EngineLost.
        """
        ...

    async def info(self) -> EngineInfo:
        """What is served; constant but for its adapters. Raises EngineLost if no engine answers."""
        ...

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serve an adapter (PEFT) that lies in a folder on the engine's host. One of this name is replaced, for requests to come;
        those that have begun keep theirs. The engines that come after this one are made to have it too.

        Raises InvalidRequest if the folder holds none that fits the model and a slot, or no slot is free; EngineLost.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more; requests that have begun keep it to their end. Raises InvalidRequest if it is not there;
        EngineLost."""
        ...

    async def stats(self) -> EngineStats:
        """Counters now. Raises EngineLost if no engine answers."""
        ...

    async def health(self) -> bool:
        """True if the engine is ready and its device loop has moved recently while it had work."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, let the running ones finish, abort what is left after `timeout_s`."""
        ...

    async def close(self) -> None:
        """Release the connection; requests still running through it end with EngineLost."""
        ...
