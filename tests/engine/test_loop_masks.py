"""The loop and the masks of grammars: whenever one comes or fails, it is its own request's affair. Over a simulated device."""

from collections.abc import Iterator

import pytest

from tests.engine.test_loop import LANES, MOST, Rig
from tests.support.fake_device import FakeGuide, expected_ids
from xlane.engine import RequestFailed
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
