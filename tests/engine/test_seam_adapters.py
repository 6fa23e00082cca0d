"""Adapters over the client seam, whatever carries it; and an engine that comes anew is given those of the last one."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.test_seam import CLIENTS, collect, connect, make_request
from tests.support.fake_core import FakeCore
from xlane.engine import InvalidRequest
from xlane.engine.rpc_client import RpcClient

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]


@pytest.mark.parametrize("kind", CLIENTS)
async def test_adapters_come_and_go(kind: str, tmp_path: Path):
    (tmp_path / "weights").write_text("1")
    core = FakeCore()
    async with connect(kind, core, tmp_path) as client:
        await client.load_adapter("new", str(tmp_path))
        assert (await client.info()).adapters == ("named", "new")
        assert core.adapters["new"] == "1"
        await client.unload_adapter("named")
        assert (await client.info()).adapters == ("new",)
        with pytest.raises(InvalidRequest, match="no adapter 'named'"):
            await client.unload_adapter("named")
        with pytest.raises(InvalidRequest, match="has no weights"):
            await client.load_adapter("more", str(tmp_path / "nowhere"))
    core.stop()


async def test_an_engine_that_comes_anew_is_given_the_adapters_of_the_last_one(tmp_path: Path):
    """Before the first request; one whose files have changed since is missed by its own requests alone."""
    kept, changes, cores = tmp_path / "kept", tmp_path / "changes", [FakeCore() for _ in range(3)]
    for folder in (kept, changes):
        folder.mkdir()
        (folder / "weights").write_text(folder.name)
    client = RpcClient(f"unix:{tmp_path}/engine.sock")
    async with connect("unix", cores[0], tmp_path):
        await client.load_adapter("kept", str(kept))
        await client.load_adapter("changes", str(changes))
        await client.unload_adapter("named")
    asked = [replace(make_request(), adapter=name) for name in ("kept", "changes", "named", "")]
    for core, served in ((cores[1], (True, True, False, True)), (cores[2], (True, False, False, True))):
        async with connect("unix", core, tmp_path):
            await client.wait_ready(5)
            got = await asyncio.gather(*(collect(client, one) for one in asked), return_exceptions=True)
            assert [isinstance(outputs, list) for outputs in got] == [*served]
            assert all(isinstance(one, list | InvalidRequest) for one in got)
        (changes / "weights").write_text("other")
    await client.close()
    for core in cores:
        core.stop()
