"""The supervisor keeps an engine process alive, gives up when that is of no use, and leaves no orphan."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support.fake_core import expected_ids
from xlane.engine import EngineLost, EngineStopped, PlanError, Request, SamplingParams
from xlane.engine.process import ParentLink, Progress, RestartPolicy, Supervisor
from xlane.engine.replay import ReplayingClient
from xlane.engine.rpc_client import RpcClient

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

ROOT = Path(__file__).resolve().parents[2]
FAKE_ENGINE = (sys.executable, "-m", "tests.support.fake_core")
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
QUICK = RestartPolicy(first_delay_s=0.01, max_delay_s=0.05, give_up_after=3)
REQUEST = Request(id="r", prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=30))


@asynccontextmanager
async def supervised(*command: str, stop_s: float = 5, **options) -> AsyncIterator[Supervisor]:
    """A supervisor that is not started yet and is stopped in the end."""
    supervisor = Supervisor(command, policy=QUICK, env=ENV, **options)
    try:
        yield supervisor
    finally:
        await supervisor.stop(stop_s)


def script(text: str) -> tuple[str, ...]:
    """A child of a few lines; `link` is its ParentLink."""
    head = "import sys, os, time, signal; from xlane.engine.process import ParentLink; link = ParentLink(int(sys.argv[-1]))\n"
    return (sys.executable, "-c", head + text)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def answer_of(supervisor: Supervisor) -> list[int]:
    client = RpcClient(supervisor.address)
    await client.wait_ready(10)
    ids = [token.id async for output in client.submit(REQUEST) for token in output.tokens]
    await client.close()
    return ids


async def test_an_engine_is_started_served_and_stopped():
    said: list[Progress] = []
    async with supervised(*FAKE_ENGINE, on_progress=said.append) as supervisor:
        await supervisor.start()
        assert said == [Progress("weights", 1, 2), Progress("ready")]
        assert await answer_of(supervisor) == expected_ids(REQUEST)
        socket = Path(supervisor.address.removeprefix("unix:"))
        pid = supervisor.pid
        assert pid is not None
        waiting = asyncio.ensure_future(supervisor.wait())
    await waiting
    assert [event.kind for event in supervisor.events] == ["started", "ready", "stopped"]
    assert supervisor.events[-1].detail == "exit code 0"
    assert not alive(pid)
    assert not socket.parent.exists()


async def test_a_killed_engine_comes_back():
    async with supervised(*FAKE_ENGINE) as supervisor:
        await supervisor.start()
        for restarts in (1, 2):
            supervisor.kill()
            await until(lambda n=restarts: [e.kind for e in supervisor.events].count("ready") == n + 1)
            assert supervisor.restarts == restarts
            assert await answer_of(supervisor) == expected_ids(REQUEST)
    died = [event.detail for event in supervisor.events if event.kind == "died"]
    assert [detail.split(":")[0] for detail in died] == ["killed by SIGKILL"] * 2


async def test_an_engine_that_hangs_tells_where_and_is_replaced(tmp_path: Path):
    (hang := tmp_path / "hang").touch()
    said: list[str] = []
    async with supervised(*FAKE_ENGINE, "--hang-once", str(hang), on_stderr=said.append) as supervisor:
        await supervisor.start()
        client = ReplayingClient(RpcClient(supervisor.address))
        ids = [token.id async for output in client.submit(REQUEST) for token in output.tokens]
        await client.close()
    assert ids == expected_ids(REQUEST), "its stream went on in the next one"
    (died,) = [event for event in supervisor.events if event.kind == "died"]
    assert died.detail.startswith("exit code 4: the engine has failed or hangs")
    assert any("in _misbehave" in line for line in said), (
        f"{said}: the thread that hangs is among those that are told"
    )


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGUSR1], ids=["stopped", "in a circle"])
async def test_an_engine_whose_event_loop_stands_still_is_killed_and_its_streams_go_on(sent: signal.Signals):
    """It was stopped; or its event loop's thread runs, and never comes back from a callback."""
    async with supervised(*FAKE_ENGINE, "--turn-s", "0.02") as supervisor:
        await supervisor.start()
        engine = RpcClient(supervisor.address)

        async def answers() -> None:
            try:
                async with asyncio.timeout(0.7):
                    while True:  # a new one may be looked for a while before it is found
                        with suppress(EngineLost):
                            await engine.serving()
                            return
                        await asyncio.sleep(0.05)
            except TimeoutError:
                raise EngineLost("it is silent") from None

        client = ReplayingClient(engine)
        outputs = client.submit(REQUEST)
        first = await anext(outputs)
        stopped = supervisor.pid
        assert stopped is not None
        os.kill(stopped, sent)
        watching = asyncio.ensure_future(supervisor.watch(answers, pause_s=0.05, misses=3))
        ids = [first.tokens[0].id] + [token.id async for output in outputs for token in output.tokens]
        assert supervisor.pid != stopped
        assert not watching.done()
        watching.cancel()
        await client.close()
    assert ids == expected_ids(REQUEST)
    (died,) = [event for event in supervisor.events if event.kind == "died"]
    assert (died.pid, died.detail.split(":")[0]) == (stopped, "killed by SIGKILL")


async def test_only_an_engine_that_serves_must_answer_and_may_miss_some(tmp_path: Path):
    """It is not asked while it loads; then each answer makes good for what was missed before."""
    loaded, asked = tmp_path / "loaded", 0
    said: list[Progress] = []
    slow = script(
        f"link.report('weights', 0, 1)\nwhile not os.path.exists({str(loaded)!r}): time.sleep(0.01)\n"
        "link.ready(); time.sleep(100)"
    )

    async def answers() -> None:
        nonlocal asked
        asked += 1
        if asked % 3:
            raise EngineLost("it is silent")

    async with supervised(*slow, on_progress=said.append) as supervisor:
        starting = asyncio.ensure_future(supervisor.start())
        watching = asyncio.ensure_future(supervisor.watch(answers, pause_s=0.001, misses=3))
        await until(lambda: said != [])
        assert asked == 0
        loaded.touch()
        await starting
        await until(lambda: asked > 20)
        watching.cancel()
        assert [event.kind for event in supervisor.events] == ["started", "ready"]


async def test_a_stop_lets_the_running_finish():
    async with supervised(*FAKE_ENGINE, "--turn-s", "0.02") as supervisor:
        await supervisor.start()
        client = RpcClient(supervisor.address)
        outputs = client.submit(REQUEST)
        first = await anext(outputs)
        stopping = asyncio.ensure_future(supervisor.stop(10))
        ids = [first.tokens[0].id] + [token.id async for output in outputs for token in output.tokens]
        await stopping
        await client.close()
    assert ids == expected_ids(REQUEST)


async def test_an_engine_that_does_not_listen_is_killed():
    deaf = script("signal.signal(signal.SIGTERM, signal.SIG_IGN); link.ready(); time.sleep(100)")
    async with supervised(*deaf) as supervisor:
        await supervisor.start()
        await supervisor.stop(0.1)
    assert supervisor.events[-1].detail == "killed by SIGKILL"


async def test_a_start_that_can_never_work_is_final():
    hopeless = script("link.failed('8 GiB do not fit in 4 GiB; use --dtype bfloat16'); sys.exit(3)")
    async with supervised(*hopeless) as supervisor:
        with pytest.raises(PlanError, match="use --dtype bfloat16"):
            await supervisor.start()
    assert [event.kind for event in supervisor.events] == ["started", "died", "gave_up"]


async def test_the_last_line_of_stderr_stands_in_for_a_message():
    heard: list[str] = []
    hopeless = script("print('first', file=sys.stderr); print('no such model', file=sys.stderr); sys.exit(3)")
    async with supervised(*hopeless, on_stderr=heard.append) as supervisor:
        with pytest.raises(PlanError, match=r"^no such model$"):
            await supervisor.start()
    assert heard == ["first\n", "no such model\n"]


async def test_dying_too_often_before_ready_is_given_up():
    async with supervised(
        *script("sys.exit('Segmentation fault')"), on_stderr=lambda line: None
    ) as supervisor:
        with pytest.raises(
            EngineLost, match=r"3 times .* \(exit code 1\); its last words: Segmentation fault"
        ):
            await supervisor.start()
        with pytest.raises(EngineLost):
            await supervisor.wait()
    assert supervisor.restarts == 2


async def test_a_stop_before_ready_ends_the_start():
    async with supervised(*script("time.sleep(100)")) as supervisor:
        starting = asyncio.ensure_future(supervisor.start())
        await until(lambda: supervisor.pid is not None)
        await supervisor.stop(5)
        with pytest.raises(EngineStopped):
            await starting


async def test_odd_lines_on_the_pipe_and_endless_ones_on_stderr_hurt_nobody():
    said: list[Progress] = []
    heard: list[str] = []
    odd = script(
        "os.write(link._fd, b'[1]\\nhello\\n'); sys.stderr.write('x' * 3_000_000 + '\\nend'); sys.stderr.flush();"
        "link.ready(); time.sleep(100)"
    )
    async with supervised(*odd, on_progress=said.append, on_stderr=heard.append) as supervisor:
        await supervisor.start()
    assert [progress.phase for progress in said] == ["unknown", "unknown", "ready"]
    assert "".join(heard) == "x" * 3_000_000 + "\nend"


PARENT = """
import asyncio, sys
from xlane.engine.process import Supervisor
async def main():
    supervisor = Supervisor([sys.executable, "-m", "tests.support.fake_core"])
    await supervisor.start()
    print(supervisor.pid, flush=True)
    await supervisor.wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_orphan_is_left(number: signal.Signals):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=ROOT, env=ENV, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.send_signal(number)
    parent.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def test_a_closed_pipe_alone_ends_the_child():
    read_fd, write_fd = os.pipe()
    watcher = script("link._watch()")
    child = subprocess.Popen([*watcher, str(write_fd)], pass_fds=(write_fd,), env=ENV)
    os.close(write_fd)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    os.close(read_fd)
    assert child.wait(10) == -signal.SIGKILL


def test_a_parent_that_is_gone_is_no_error_to_talk_to():
    read_fd, write_fd = os.pipe()
    link = ParentLink(write_fd)
    link.report("weights", 3, 4)
    assert os.read(read_fd, 100) == b'{"phase": "weights", "done": 3, "total": 4}\n'
    os.close(read_fd)
    link.ready()
    os.close(write_fd)


async def test_delays_grow_to_their_bound():
    policy = RestartPolicy(first_delay_s=0.5, max_delay_s=3)
    assert [policy.delay_s(deaths) for deaths in range(6)] == [0, 0.5, 1, 2, 3, 3]
