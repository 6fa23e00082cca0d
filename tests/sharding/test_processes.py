"""Two or four processes, one model: the tokens of one process, and no process outlives another.

A group that lost one is whole again when all were started again."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from llguidance import LLMatcher

from tests.engine.conftest import ids, request, run
from tests.sharding.test_meshes import PROMPTS, SPLIT_VOCAB
from tests.support.group_process import DRAIN_S
from tests.support.guided import MODEL_VOCAB, byte_level
from tests.support.tiny import tiny_model
from tests.support.untrained import untrained_model
from xlane.engine.process import Supervisor
from xlane.engine.replay import ReplayingClient
from xlane.engine.rpc_client import RpcClient
from xlane.sharding.processes import ProcessError, all_equal, join_processes, least_of_all

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ENDS_WITHIN_S = 60
# Every process compiles for itself, and no follower finds anything in the cache: few programs, and quickly.
OPTIONS = {
    "lanes": 2, "page_tokens": 4, "max_total_tokens": 96, "prefill_chunk_tokens": 8, "kernels": "xla", "processes": 2,
}  # fmt: skip
ONE_LANE = {"lanes": 1, "max_total_tokens": 64, "load_format": "dummy"}
REQUESTS = (
    [(prompt, {"max_tokens": 6}) for prompt in PROMPTS]
    + [
        (prompt, {"max_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": seed})
        for seed, prompt in enumerate(PROMPTS)
    ]
    + [([5, 6], {"max_tokens": 16, "logit_bias": [(7, 100.0)]})]
)

Start = Callable[..., subprocess.Popen[str]]


def free_ports() -> int:
    """A port that is free together with the next one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many simulated devices, that compiles in haste as this one does."""
    counted = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": re.sub(r"--xla_force_host\S*", counted, os.environ["XLA_FLAGS"])}


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Start]:
    """Start process N of a group, of two unless told otherwise, each with `devices` simulated devices of its own."""
    coordinator = f"127.0.0.1:{free_ports()}"
    started: list[subprocess.Popen[str]] = []
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]

    def make(
        process_id: int, *told: str, model: Path | None = None, devices: int = 1, **options: object
    ) -> subprocess.Popen[str]:
        model = model or tiny_model(SPLIT_VOCAB, models)
        config = {
            **OPTIONS,
            "coordinator": coordinator,
            "process_id": process_id,
            "cache_dir": cache,
            **options,
        }
        command = [sys.executable, "-m", "tests.support.group_process", str(model)]
        process = subprocess.Popen(
            [*command, json.dumps(config), *told],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment(devices),
        )  # fmt: skip
        started.append(process)
        return process

    yield make
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def running(start: Start, tmp_path: Path) -> list[subprocess.Popen[str]]:
    """A leader and its follower with a model of one layer, in the middle of answering for ever."""
    model = untrained_model(tmp_path / "model", num_hidden_layers=1)
    both = [start(0, "forever", model=model, **ONE_LANE), start(1, model=model, **ONE_LANE)]
    assert both[0].stdout is not None
    assert "running\n" in both[0].stdout
    return both


@pytest.mark.parametrize(
    ("count", "devices", "options"),
    [(2, 2, {"speculate": 3}), (4, 1, {"data_parallel": 4, "lanes": 4})],
    ids=str,
)
def test_several_processes_make_the_tokens_of_one(
    engine_of, start: Start, count: int, devices: int, options: dict
):
    options = {"processes": count, "devices": devices, **options}
    leader = start(0, json.dumps(REQUESTS), **options)
    followers = [start(number, **options) for number in range(1, count)]
    single = engine_of(SPLIT_VOCAB)
    expected = [ids(output) for output in run(single, *(request(prompt, **how) for prompt, how in REQUESTS))]
    output, errors = leader.communicate(timeout=300)
    assert leader.returncode == 0, errors
    assert json.loads(output.splitlines()[-1]) == expected  # before it, gloo says that it is connected
    for follower in followers:
        _, errors = follower.communicate(timeout=ENDS_WITHIN_S)
        assert follower.returncode == 0, errors


def test_a_guided_request_through_a_group_makes_the_tokens_of_one_process(start: Start, tmp_path: Path):
    text = byte_level()
    model = untrained_model(tmp_path / "model", num_hidden_layers=1, vocab_size=MODEL_VOCAB)
    text.backend.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    schema = {"type": "object", "properties": {"true": {"type": "boolean"}, "n": {"enum": [1, 12, 2]}}}
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    how = {"max_tokens": 40, "stop_ids": list(text.eos_ids)}
    requests = [
        ([5, 6, 7], {**how, "grammar": grammar}), ([5, 6, 8], {"max_tokens": 6}),
        ([9], {**how, "grammar": grammar, "temperature": 1.0, "seed": 3}),
    ]  # fmt: skip
    options = {**ONE_LANE, "lanes": 2, "model": model}
    alone = start(0, json.dumps(requests), **options, processes=1, coordinator=None)
    split = {**options, "data_parallel": 2, "speculate": 4}
    both = [start(0, json.dumps(requests), **split), start(1, **split)]
    said: list[list[list[int]]] = []
    for process in (alone, both[0]):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        said.append(json.loads(output.splitlines()[-1]))
    assert said[0] == said[1]
    for guided in (said[0][0], said[0][2]):
        jsonschema.validate(json.loads(text.decode(guided)), schema)


def test_a_follower_does_not_outlive_its_leader(running: list[subprocess.Popen[str]]):
    leader, follower = running
    leader.kill()
    _, errors = follower.communicate(timeout=ENDS_WITHIN_S)
    assert follower.returncode == 5, errors
    assert "the leader (process 0 at 127.0.0.1:" in errors


def test_a_follower_that_is_told_to_end_waits_for_its_leader_and_ends(running: list[subprocess.Popen[str]]):
    leader, follower = running
    began = time.monotonic()
    follower.send_signal(signal.SIGTERM)
    _, errors = follower.communicate(timeout=ENDS_WITHIN_S)
    assert time.monotonic() - began >= DRAIN_S
    assert follower.returncode == 5, errors
    assert "process 1 was told to end, and the leader goes on" in errors
    assert leader.wait(ENDS_WITHIN_S) == 5


def test_processes_that_met_still_end_by_sigterm():
    join = "import sys, time; from xlane.sharding.processes import join_processes as join; join(sys.argv[1], 2, int(sys.argv[2]))"
    told = [
        sys.executable,
        "-c",
        f"{join}; print('met', flush=True); time.sleep(60)",
        f"127.0.0.1:{free_ports()}",
    ]
    both = [subprocess.Popen([*told, str(number)], stdout=subprocess.PIPE, text=True) for number in (0, 1)]
    try:
        for process in reversed(both):
            assert process.stdout is not None
            assert "met\n" in process.stdout
            process.send_signal(signal.SIGTERM)
            assert process.wait(ENDS_WITHIN_S / 4) == -signal.SIGTERM
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_group_that_lost_a_process_is_started_again_and_its_stream_goes_on(tmp_path: Path):
    model = untrained_model(tmp_path / "model", num_hidden_layers=1)
    command = [
        sys.executable, "-m", "xlane.server", "engine", "--model-id", str(model), "--load-format=dummy", "--kernels=xla",
        "--max-batch-size=1", "--page-tokens=4", "--max-batch-prefill-tokens=8", "--num-processes=2",
        f"--coordinator=127.0.0.1:{free_ports()}", "--cache-dir=none",
    ]  # fmt: skip
    asyncio.run(_lose_a_follower(command, environment(devices=1)))


async def _lose_a_follower(command: list[str], env: dict[str, str]) -> None:
    followers: list[asyncio.subprocess.Process] = []

    async def follow() -> None:
        """As a service manager does: one that ends is started again."""
        while True:
            follower = await asyncio.create_subprocess_exec(*command, "--process-id=1", env=env)
            followers.append(follower)
            await follower.wait()

    leader = Supervisor([*command, "--process-id=0"], env=env)
    following = asyncio.create_task(follow())
    asked = request([5, 6, 7], max_tokens=50)
    tokens: list[int] = []
    try:
        async with asyncio.timeout(300):
            await leader.start()
            client = ReplayingClient(RpcClient(leader.address))
            async for output in client.submit(asked):
                tokens += (token.id for token in output.tokens)
                if len(followers) == 1:
                    followers[0].kill()
            undisturbed = [output async for output in client.submit(replace(asked, id="again"))]
            await client.close()
    finally:
        following.cancel()
        await leader.stop(1)  # first: it would be started again for a follower that is gone
        for follower in followers:
            if follower.returncode is None:
                follower.kill()
                await follower.wait()
    assert (len(tokens), client.replays, leader.restarts) == (50, 1, 1)
    assert tokens == ids(undisturbed)
    (died,) = [event.detail for event in leader.events if event.kind == "died"]
    assert died.startswith("exit code 5")
    assert f"process 1 on {socket.gethostname()} is gone" in died


def test_a_leader_that_fails_ends_and_so_does_its_follower(running: list[subprocess.Popen[str]]):
    leader, follower = running
    assert leader.stdout is not None
    leader.stdout.close()  # its next word raises, and nobody stops the engine
    assert leader.wait(ENDS_WITHIN_S) != 0
    _, errors = follower.communicate(timeout=ENDS_WITHIN_S)
    assert follower.returncode == 5, errors
    assert "the leader (process 0 at 127.0.0.1:" in errors


def test_processes_that_decide_differently_end_with_the_difference(start: Start):
    leader, follower = start(0, "[]"), start(1, lanes=4)
    for process in (leader, follower):
        _, errors = process.communicate(timeout=ENDS_WITHIN_S)
        assert process.returncode == 3
        assert "has decided prefill_segments=4, and the leader prefill_segments=2" in errors


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data_parallel": 2, "model_parallel": 2}, "can be split along one axis"),
        ({"model_parallel": 2}, "leaves out all devices of process 1: 4 devices are there"),
    ],
    ids=str,
)
def test_a_mesh_that_a_group_cannot_have_is_refused_in_both(start: Start, mesh: dict, message: str):
    for process in [start(0, "[]", devices=2, **mesh), start(1, devices=2, **mesh)]:
        _, errors = process.communicate(timeout=ENDS_WITHIN_S)
        assert process.returncode == 3
        assert message in errors


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ((None, 2, 0), "give --coordinator"),
        (("localhost:1", 2, 2), "process 2 of 2"),
        (("localhost", 2, 0), "has no port"),
        ((None, 1, 1), "1 of 1"),
    ],
)
def test_what_cannot_be_joined_is_refused(told: tuple, message: str):
    with pytest.raises(ProcessError, match=message):
        join_processes(*told)


def test_one_process_agrees_with_itself():
    join_processes(None, 1, 0)
    assert least_of_all(12345) == 12345
    assert all_equal("anything")
