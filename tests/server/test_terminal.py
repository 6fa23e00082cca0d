"""`xlane chat` and `xlane top` against a real server over a fake engine: what is typed, what is shown, what is sent."""

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from xlane.engine import LaneStats
from xlane.server.backend import Backend
from xlane.server.cli import run
from xlane.server.config import ServerConfig
from xlane.server.options import UsageError
from xlane.server.remote import Remote, RemoteError
from xlane.server.talk import chat
from xlane.server.top import screen

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine
from ..support.live_server import live_server
from .test_models import made

KEY = "k-1"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeEngine]]:
    engine, backend = FakeEngine(), Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with live_server(backend, ServerConfig(api_key=KEY)) as server:
        yield server.url, engine


@pytest.fixture
def engine(served: tuple[str, FakeEngine]) -> FakeEngine:
    engine = served[1]
    engine.delay_s, engine.reply = 0.0, None
    engine.submitted.clear()
    engine.cancelled.clear()
    engine.lanes.clear()
    return engine


def typed(url: str, *lines: str, key: str | None = KEY, out: io.StringIO | None = None) -> str:
    """What a conversation shows in which these lines are typed, and then Ctrl-D."""
    left, out = list(lines), out or io.StringIO()

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    assert chat({"url": url, "api_key": key}, read, out) == 0
    return out.getvalue()


def sent(engine: FakeEngine) -> str:
    return bytes(engine.submitted[-1].prompt_ids).decode()


def test_an_answer_is_shown_and_remembered(served: tuple[str, FakeEngine], engine: FakeEngine):
    shown = typed(served[0], "/set temperature 0", "/set max_tokens 5", "/system be brief", "xy", "and then")
    assert "\nabcde\n[5 tokens in " in shown
    assert all(part in sent(engine) for part in ("be brief", "xy", "abcde", "and then"))
    assert engine.submitted[-1].sampling.max_tokens == 5
    typed(served[0], "xy", "/new", "/set max_tokens 2", "q")
    assert "xy" not in sent(engine)


def test_a_wrong_command_is_told_and_sends_nothing(served: tuple[str, FakeEngine], engine: FakeEngine):
    shown = typed(served[0], "/wat", "/set heat 3", "/set seed x", "  ")
    for part in ("There is no command /wat", "/set takes one of temperature", "seed=x is no number"):
        assert part in shown
    assert engine.submitted == []


def test_ctrl_c_ends_the_answer_and_frees_its_lane(served: tuple[str, FakeEngine], engine: FakeEngine):
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if text == "d":
                raise KeyboardInterrupt
            return super().write(text)

    engine.delay_s = 0.02
    shown = typed(served[0], "/set temperature 0", "xyz", out=Interrupted())
    assert "abc\n[stopped]" in shown
    end = time.monotonic() + 10
    while not engine.cancelled and time.monotonic() < end:
        time.sleep(0.01)
    assert len(engine.cancelled) == 1


def test_what_the_server_refuses_is_said_and_not_remembered(
    served: tuple[str, FakeEngine], engine: FakeEngine
):
    assert "error: A valid key is required" in typed(served[0], "a", key=None)
    shown = typed(served[0], "/set temperature 9", "lost", "/set temperature 0", "/set max_tokens 2", "a")
    assert "error: " in shown
    assert "temperature" in shown
    assert "lost" not in sent(engine)


def test_a_server_that_is_not_there():
    with pytest.raises(RemoteError, match=r"does not answer.*xlane serve"):
        Remote("http://127.0.0.1:9").get("/ui/lanes")
    with pytest.raises(UsageError, match="--url=ftp://x"):
        Remote("ftp://x")


def test_nobody_to_talk_to():
    shown = io.StringIO()
    assert chat({"url": "http://127.0.0.1:9"}, lambda prompt: pytest.fail("nothing is asked"), shown) == 1
    assert "does not answer" in shown.getvalue()


def test_one_look(served: tuple[str, FakeEngine], engine: FakeEngine, capsys: pytest.CaptureFixture[str]):
    numbers = {"prompt_tokens": 8, "cached_tokens": 3, "most_tokens": 40, "pages": 2, "age_s": 1.5}
    engine.lanes[0] = LaneStats(lane=0, prefill=True, generated_tokens=0, computed_tokens=2, **numbers)  # type: ignore[arg-type]
    engine.lanes[3] = LaneStats(lane=3, prefill=False, generated_tokens=12, computed_tokens=19, **numbers)  # type: ignore[arg-type]
    argv = ["top", "--once", "--url", served[0]]
    assert run([*argv, "--api-key", KEY], {}) == 0
    first, second, _, _, *rows, _ = capsys.readouterr().out.splitlines()
    assert first.strip() == "fake/alphabet · 1 x fake · float32"
    assert second.strip() == "lanes 2/8 · queue 0 · pages 4/64"
    assert [row.replace("━", "").split() for row in rows] == [
        ["0", "prefill", "25%", "8", "3", "0", "2", "1.5"],
        ["3", "decode", "8", "3", "12", "2", "1.5"],
    ]
    assert run(argv, {}) == 1
    assert "A valid key is required" in capsys.readouterr().out


def test_of_several_models_those_that_are_loaded_show_their_lanes(capsys: pytest.CaptureFixture[str]):
    models, stands = made(most=2)
    with live_server(stands["a"].backend, models=models) as server:
        assert "\nabc\n[3 tokens in " in typed(
            server.url, "/set max_tokens 3", "/set temperature 0", "/model c", "a"
        )
        assert run(["top", "--once", "--url", server.url], {}) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown if "·" in line and "lanes" not in line] == [
        "a · 1 x fake · float32",
        "c · 1 x fake · float32",
        "b · not loaded: it is loaded when it is asked for",
    ]


def test_rates_are_of_the_time_between_two_looks(served: tuple[str, FakeEngine], engine: FakeEngine):
    before: dict[str, Any] = Remote(served[0], KEY).get("/ui/lanes")
    now = before | {"decode_tokens": before["decode_tokens"] + 30, "prefill_tokens": before["prefill_tokens"]}
    now |= {"itl": {"count": before["itl"]["count"] + 4, "sum_s": before["itl"]["sum_s"] + 0.05}}
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as shown:
        console.print(screen(now, before, 0.5))
    assert "output 60 tokens/s · prompts 0 tokens/s · itl 12.5 ms" in shown.get()
    assert "ttft" not in shown.get()
