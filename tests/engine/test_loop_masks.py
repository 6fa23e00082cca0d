"""The loop and the masks of grammars: whenever one comes or fails, it is its own request's affair. Over a simulated device."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.test_loop import LANES, MOST, Rig
from tests.support.fake_device import FakeGuide, expected_ids
from xlane.engine import DeadlineExceeded, RequestFailed
from xlane.engine import loop as engine_loop
from xlane.engine.local import Delivery, RequestError
from xlane.engine.turn import Turn


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.gate.set()
    rig.loop.stop()
    assert not rig.loop.thread.is_alive()


def fail_before_plan(rig: Rig, monkeypatch: pytest.MonkeyPatch, guide: FakeGuide, *, in_queue: bool) -> None:
    """The mask that `guide` waits for fails when the loop has looked at masks, and is about to plan."""
    plan = rig.plans.plan

    def fail_and_plan() -> Turn:
        for one in rig.plans.sequences():
            if one.guide is guide and (one.lane < 0) is in_queue and not guide.mask.done():
                guide.mask.set_exception(RequestFailed("too many expressions"))
        return plan()

    monkeypatch.setattr(rig.plans, "plan", fail_and_plan)


@pytest.mark.parametrize("where", ["in the queue", "in a lane", "preempted"])
def test_a_mask_that_fails_unseen_ends_its_own_request_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    guide = FakeGuide(MOST, late=[])
    if where == "in the queue":
        guide.prepare()  # as after tokens that are forced at once
    fail_before_plan(rig, monkeypatch, guide, in_queue=where != "in a lane")

    def urgent(delivery: Delivery) -> None:
        if where == "preempted" and delivery.request_id == "bad" and "urgent" not in asked:
            asked["urgent"] = rig.ask("urgent", max_tokens=9)

    rig.sink.on_delivery = urgent
    asked = {name: rig.ask(name, max_tokens=20) for name in "abcd"[: LANES - 1]}
    rig.ask("bad", max_tokens=20, guide=guide, priority=1)
    (last,) = rig.sink.wait("bad")
    assert isinstance(last, RequestError)
    assert isinstance(last.error, RequestFailed)
    rig.sink.wait(*asked)
    assert all(rig.sink.ids(name) == expected_ids(one, MOST) for name, one in asked.items())
    assert rig.plans.preemptions == (where == "preempted")
    assert rig.loop.healthy()


class Elsewhere(list[FakeGuide]):
    """Late masks that another thread computes."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def append(self, guide: FakeGuide) -> None:
        self._pool.submit(guide.compute)


class Held(list[FakeGuide]):
    """Late masks that wait for the test."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False

    def append(self, guide: FakeGuide) -> None:
        with self._changed:
            super().append(guide)
            if self._open:
                guide.compute()
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        """Return when so many are wanted."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self) >= count, 20)

    def open(self) -> None:
        """Compute them, and from now on each at once."""
        with self._changed:
            self._open = True
            for guide in self:
                guide.compute()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits until it stalls waits longer than any test."""
    monkeypatch.setattr(engine_loop, "STALL_S", 100.0)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("elsewhere", [False, True], ids=["at once", "by another thread"])
def test_nobody_waits_for_the_mask_of_another_even_where_all_have_grammars(rig: Rig, elsewhere: bool) -> None:
    held = Held()
    slow = rig.ask("slow", max_tokens=20, guide=FakeGuide(12, held), grammar="12")
    held.wait(1)
    with ThreadPoolExecutor(2) as pool:
        quick = [
            rig.ask(name, max_tokens=20, guide=FakeGuide(15, Elsewhere(pool) if elsewhere else None), grammar="15")
            for name in "abcdef"
        ]  # fmt: skip
        rig.sink.wait(*"abcdef")
    assert not rig.sink.ended("slow")
    held.open()
    rig.sink.wait("slow")
    for one in (slow, *quick):
        assert rig.sink.ids(one.id) == expected_ids(one, MOST)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("name", ["runs", "waits"])
def test_a_deadline_is_kept_while_everybody_waits_for_masks(rig: Rig, name: str) -> None:
    held = Held()
    for number in range(LANES - (name == "runs")):
        rig.ask(f"g{number}", max_tokens=20, guide=FakeGuide(12, held))
    held.wait(LANES - (name == "runs"))
    rig.ask(name, max_tokens=20, guide=FakeGuide(12, held), deadline_s=0.05)
    (last,) = rig.sink.wait(name)
    assert isinstance(last, RequestError)
    assert isinstance(last.error, DeadlineExceeded)


@pytest.mark.usefixtures("endless")
def test_who_can_only_wait_does_not_turn_meanwhile(rig: Rig) -> None:
    held = Held()
    for number in range(LANES + 1):
        rig.ask(f"g{number}", max_tokens=20, guide=FakeGuide(12, held))
    held.wait(LANES)
    before = rig.device.turns
    time.sleep(0.1)
    assert rig.device.turns <= before + 3


def test_masks_that_come_within_half_a_step_go_on_together(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(rig.counters), "step_ms", 40_000.0)
    held, rows = Held(), []
    rig.shut()
    rig.ask("first", max_tokens=1)
    rig.held()
    for name in "ab":
        rig.ask(name, max_tokens=3, guide=FakeGuide(12, held))
    rig.device.before_launch = lambda turn: rows.append(len(turn.rows))
    rig.gate.set()
    held.wait(2)
    held.open()
    rig.sink.wait(*"ab")
    assert set(rows) == {0, 2}
