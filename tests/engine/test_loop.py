"""The loop over a simulated device: every waiter hears its end exactly once, whatever breaks, however threads meet."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import pytest

from tests.support.fake_device import FakeDevice, FakeGuide, Oracle, expected_ids
from xlane.engine import (
    DeadlineExceeded,
    EngineLost,
    EngineStopped,
    FinishReason,
    InvalidRequest,
    Request,
    SamplingParams,
    StepOutput,
)
from xlane.engine import loop as engine_loop
from xlane.engine.local import Delivery, RequestError
from xlane.engine.loop import Loop
from xlane.engine.pages import PageAllocator
from xlane.engine.scheduler import Limits, Scheduler
from xlane.engine.sequence import Sequence
from xlane.engine.stats import Counters

MOST = 32
LANES = 3


class Sink:
    """Keeps what it is given; `wait` returns when a request has ended."""

    def __init__(self) -> None:
        self.got: dict[str, list[Delivery]] = {}
        self._changed = threading.Condition()
        self.on_delivery: Callable[[Delivery], None] = lambda delivery: None

    def deliver(self, batch: list[Delivery]) -> None:
        for one in batch:
            self.on_delivery(one)
        with self._changed:
            for one in batch:
                self.got.setdefault(one.request_id, []).append(one)
            self._changed.notify_all()

    def wait(self, *names: str) -> list[Delivery]:
        with self._changed:
            assert self._changed.wait_for(lambda: all(self.ended(name) for name in names), 20)
        return [self.got[name][-1] for name in names]

    def ended(self, name: str) -> bool:
        last = self.got.get(name, [None])[-1]
        return isinstance(last, RequestError) or (last is not None and last.finish_reason is not None)

    def ids(self, name: str) -> list[int]:
        return [token.id for one in self.got[name] if isinstance(one, StepOutput) for token in one.tokens]


class Rig:
    """A loop, its simulated device, and a gate that can hold the device's answers back."""

    def __init__(self) -> None:
        pages = PageAllocator(12)
        self.device = FakeDevice(LANES, 12, 4, MOST // 4)
        self.plans = Scheduler(Limits(LANES, 4, 8, 4, decode_rows=8), pages)
        self.counters = Counters()
        self.loop = Loop(self.device, self.plans, self.counters)  # type: ignore[arg-type]
        self.sink = Sink()
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Event()
        self.device.before_read = self._pass_gate
        self._arrivals = count()
        self.loop.start()

    def _pass_gate(self) -> None:
        self.reading.set()
        assert self.gate.wait(20)

    def ask(
        self,
        name: str,
        *,
        sink: Sink | None = None,
        max_tokens: int = 5,
        guesses: int = 0,
        guide: FakeGuide | None = None,
        **changes,
    ) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        prompt = tuple(1 + ord(letter) % 60 for letter in name)
        asked = Request(id=name, prompt_ids=prompt, sampling=sampling, **changes)
        most = min(MOST, len(prompt) + max_tokens)
        sequence = Sequence(asked, sink or self.sink, next(self._arrivals), most)
        sequence.guide = guide  # type: ignore[assignment]
        if guesses:
            sequence.drafter = Oracle(sequence, guesses, MOST, lambda at: at % 5 == 0)  # type: ignore[assignment]
        assert self.loop.submit(sequence)
        return asked

    def shut(self) -> None:
        """From now on the device answers no more, until the gate is opened."""
        self.gate.clear()
        self.reading.clear()

    def held(self) -> None:
        """Return when the loop waits for the device."""
        assert self.reading.wait(20)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.gate.set()
    rig.loop.stop()
    assert not rig.loop.thread.is_alive()


def test_many_requests_from_many_threads_each_get_their_own_tokens(rig: Rig) -> None:
    asked: list[Request] = []

    def client(letter: str) -> None:
        for number in range(12):
            asked.append(rig.ask(f"{letter}{number}", max_tokens=3 + number))

    threads = [threading.Thread(target=client, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.sink.wait(*(one.id for one in asked))
    for one in asked:
        assert rig.sink.ids(one.id) == expected_ids(one, MOST)
    assert rig.loop.wait_idle(20)
    assert (rig.loop.live, rig.plans.running, rig.plans.pages.free) == (0, 0, 12)
    assert rig.counters.decode_tokens == sum(one.sampling.max_tokens for one in asked)
    assert rig.loop.healthy()


def test_launches_are_counted_by_kind_and_newcomers_beside_others_as_joins(rig: Rig) -> None:
    rig.ask("a", max_tokens=5)
    rig.sink.wait("a")
    assert rig.loop.wait_idle(20)
    # One token comes from the prefill, so four decodes, and one more that was under way when the end was read.
    kinds = (rig.counters.prefill, rig.counters.decode)
    counts = [
        [sum(h.counts) for h in (k.whole_s, k.device_s, k.emit_s)] for k in (one.snapshot() for one in kinds)
    ]
    assert counts[0] == [1, 1, 1]
    assert counts[1] in ([4, 4, 4], [5, 5, 5])
    assert rig.counters.joins == 0
    rig.shut()
    rig.ask("b", max_tokens=20)
    rig.held()
    rig.ask("c")
    rig.ask("d")
    rig.gate.set()
    rig.sink.wait("b", "c", "d")
    assert rig.loop.wait_idle(20)
    assert rig.counters.joins in (1, 2)
    rows = rig.counters.prefill_rows.snapshot()
    assert (sum(rows.counts) >= 2, rows.sum) == (True, 4.0)


def test_times_are_in_order_and_the_queue_ends_at_the_first_launch(rig: Rig) -> None:
    rig.shut()
    rig.ask("slow")
    rig.held()
    time.sleep(0.1)
    rig.gate.set()
    rig.sink.wait("slow")
    first, *between, last = [one.timing for one in rig.sink.got["slow"] if isinstance(one, StepOutput)]
    assert last is not None
    assert 0 < last.queue_s <= last.first_token_s - 0.1 < last.total_s
    assert first == replace(last, total_s=last.first_token_s)
    assert between == [None] * len(between)
    assert len(rig.counters._served_s) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["launch", "read"])
def test_a_failing_device_tells_every_waiter_and_takes_no_more(where: str) -> None:
    rig = Rig()
    broken, other = Sink(), Sink()

    def refuse(delivery: Delivery) -> None:
        raise OSError("this connection is broken, too")

    broken.on_delivery = refuse
    rig.shut()
    names = [f"q{number}" for number in range(6)]
    rig.ask("broken", sink=broken, max_tokens=20)
    for name in names:
        rig.ask(name, max_tokens=20)
    rig.ask("other", sink=other, max_tokens=20)
    rig.held()

    def fail(*args: object) -> None:
        raise RuntimeError("the device is on fire")

    if where == "launch":
        rig.device.before_launch = fail
    else:
        rig.device.before_read = fail
    rig.ask("late", max_tokens=20)
    rig.gate.set()
    for last in [*rig.sink.wait(*names, "late"), *other.wait("other")]:
        assert isinstance(last, RequestError)
        assert isinstance(last.error, EngineLost)
        assert "RuntimeError: the device is on fire" in str(last.error)
    assert not rig.loop.healthy()
    assert rig.loop.wait_idle(20)
    with pytest.raises(EngineStopped, match="on fire"):
        rig.ask("too late")
    rig.loop.cancel("q0")
    rig.loop.stop()
    assert all(sum(isinstance(one, RequestError) for one in got) == 1 for got in rig.sink.got.values())


def test_one_broken_sink_costs_its_own_requests_and_no_others(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Sink()

    def refuse(delivery: Delivery) -> None:
        raise OSError("this connection is broken")

    broken.on_delivery = refuse
    rig.ask("bad", sink=broken)
    good = rig.ask("good", max_tokens=9)
    rig.sink.wait("good")
    assert rig.sink.ids("good") == expected_ids(good, MOST)
    assert rig.loop.wait_idle(20)
    assert rig.loop.healthy()
    assert "their sink failed" in caplog.text


def test_stop_aborts_what_runs_and_what_waits_once_and_may_be_called_again(rig: Rig) -> None:
    rig.shut()
    names = [f"r{number}" for number in range(8)]
    for name in names:
        rig.ask(name, max_tokens=20)
    rig.held()
    stopping = threading.Thread(target=rig.loop.stop)
    stopping.start()
    rig.gate.set()
    stopping.join(20)
    for last in rig.sink.wait(*names):
        assert isinstance(last, StepOutput)
        assert last.finish_reason is FinishReason.ABORT
        assert last.timing is not None
    rig.loop.stop()
    assert not rig.loop.thread.is_alive()
    assert rig.plans.pages.free == 12
    with pytest.raises(EngineStopped, match="takes no more requests"):
        rig.ask("late")


def test_stop_ends_an_idle_loop(rig: Rig) -> None:
    rig.loop.stop()
    assert not rig.loop.healthy()


@pytest.mark.parametrize("name", ["running", "queued"])
def test_a_cancel_ends_one_request_and_leaves_the_others(rig: Rig, name: str) -> None:
    rig.shut()
    others = [rig.ask(f"o{number}", max_tokens=20) for number in range(LANES - 1)]
    rig.ask("running", max_tokens=25)
    rig.ask("queued", max_tokens=25)
    rig.held()
    rig.loop.cancel(name)
    rig.loop.cancel(name)
    rig.loop.cancel("nobody")
    rig.gate.set()
    (last,) = rig.sink.wait(name)
    assert isinstance(last, StepOutput)
    assert last.finish_reason is FinishReason.ABORT
    rig.sink.wait(*(one.id for one in others))
    assert all(rig.sink.ids(one.id) == expected_ids(one, MOST) for one in others)


def test_a_cancel_that_comes_too_late_does_not_hit_the_next_user_of_the_id(rig: Rig) -> None:
    rig.shut()
    again: list[Request] = []

    def ask_again(delivery: Delivery) -> None:
        if not again:
            again.append(rig.ask("same", max_tokens=7))

    rig.sink.on_delivery = ask_again
    rig.ask("same", max_tokens=1)
    rig.held()  # its only token is being read
    rig.loop.cancel("same")
    rig.gate.set()
    assert rig.loop.wait_idle(20)
    first, *rest = rig.sink.got["same"]
    assert isinstance(first, StepOutput)
    assert first.finish_reason is FinishReason.LENGTH
    assert [one.finish_reason for one in rest if isinstance(one, StepOutput)] == [None] * 6 + [
        FinishReason.LENGTH
    ]


def test_an_id_in_use_is_refused_and_its_first_user_goes_on(rig: Rig) -> None:
    rig.shut()
    asked = rig.ask("mine", max_tokens=20)
    rig.held()
    with pytest.raises(InvalidRequest, match="'mine' is already running"):
        rig.ask("mine")
    rig.gate.set()
    rig.sink.wait("mine")
    assert rig.sink.ids("mine") == expected_ids(asked, MOST)


def test_no_more_are_taken_than_asked_for_however_many_ask_at_once(rig: Rig) -> None:
    rig.shut()
    rig.ask("held", max_tokens=20)
    rig.held()
    taken: list[bool] = []

    def client(number: int) -> None:
        asked = Request(id=f"c{number}", prompt_ids=(1,), sampling=SamplingParams(max_tokens=2))
        taken.append(rig.loop.submit(Sequence(asked, rig.sink, 100 + number, 3), most_live=6))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 15 + [True] * 5
    rig.gate.set()


@pytest.mark.parametrize("name", ["runs", "waits"])
def test_a_deadline_ends_its_own_request_alone(rig: Rig, name: str) -> None:
    rig.shut()
    asked = rig.ask("patient", max_tokens=20)
    for number in range(LANES - 1 if name == "waits" else 0):
        rig.ask(f"o{number}", max_tokens=20)
    rig.ask(name, max_tokens=20, deadline_s=0.02)
    rig.held()
    time.sleep(0.03)
    rig.gate.set()
    (last,) = rig.sink.wait(name)
    assert isinstance(last, RequestError)
    assert isinstance(last.error, DeadlineExceeded)
    assert "deadline of 0.02 s" in str(last.error)
    rig.sink.wait("patient")
    assert rig.sink.ids("patient") == expected_ids(asked, MOST)


def test_a_request_that_ended_is_not_kept_until_its_deadline(rig: Rig) -> None:
    sinks: list[weakref.ref[Sink]] = []
    for number in range(300):
        sink = Sink()
        sinks.append(weakref.ref(sink))
        rig.ask(f"n{number}", sink=sink, max_tokens=1, deadline_s=3600.0)
        sink.wait(f"n{number}")
    del sink
    assert rig.loop.wait_idle(20)
    gc.collect()
    assert sum(one() is not None for one in sinks) < 100


def test_idle_means_that_every_last_output_was_delivered(rig: Rig) -> None:
    rig.sink.on_delivery = lambda delivery: time.sleep(0.05)
    rig.ask("slow", max_tokens=2)
    rig.loop.close_intake()
    assert rig.loop.wait_idle(20)
    assert rig.sink.ended("slow")


def test_a_slow_sink_delays_and_loses_nothing(rig: Rig) -> None:
    slow = Sink()
    slow.on_delivery = lambda delivery: time.sleep(0.002)
    asked = [
        rig.ask(f"s{number}", sink=slow if number % 2 else rig.sink, max_tokens=8) for number in range(8)
    ]
    for number, one in enumerate(asked):
        sink = slow if number % 2 else rig.sink
        sink.wait(one.id)
        assert sink.ids(one.id) == expected_ids(one, MOST)


def test_a_loop_that_hangs_is_unhealthy_until_it_moves(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.shut()
    monkeypatch.setattr(engine_loop, "STALL_S", 0.1)
    time.sleep(0.15)
    assert rig.loop.healthy()  # nothing to do is no stall
    rig.ask("stuck", max_tokens=3)
    rig.held()
    time.sleep(0.15)
    assert not rig.loop.healthy()
    rig.gate.set()
    rig.sink.wait("stuck")
    assert rig.loop.healthy()


def test_whoever_guesses_gets_the_same_text_in_fewer_turns_and_so_do_those_beside_it(rig: Rig) -> None:
    asked = [rig.ask("guesses", max_tokens=20, guesses=4)]
    rig.sink.wait("guesses")
    assert rig.device.turns <= 9  # one of five tokens is guessed wrongly
    asked += [rig.ask("both", max_tokens=20, guesses=2), rig.ask("neither", max_tokens=20)]
    rig.sink.wait("both", "neither")
    for one in asked:
        assert rig.sink.ids(one.id) == expected_ids(one, MOST)
    accepted = rig.counters.accepted.snapshot()
    assert accepted.sum >= 20
    assert sum(accepted.counts) + accepted.sum == 60
    assert rig.counters.decode_tokens == 60


def test_a_closed_intake_refuses_the_new_and_finishes_the_old(rig: Rig) -> None:
    rig.shut()
    rig.ask("old", max_tokens=20)
    rig.held()
    rig.loop.close_intake()
    with pytest.raises(EngineStopped):
        rig.ask("new")
    assert not rig.loop.wait_idle(0.01)
    rig.gate.set()
    assert rig.loop.wait_idle(20)
    (last,) = rig.sink.wait("old")
    assert isinstance(last, StepOutput)
    assert last.finish_reason is FinishReason.LENGTH
