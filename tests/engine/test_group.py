"""Leader and followers in one process: who is taken, what they are told, who hears of an end."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.sharding.test_processes import free_ports
from xlane.engine import EngineLost, PlanError
from xlane.engine.group import AHEAD, Follower, Leader
from xlane.engine.turn import Size

DECISIONS = {"shapes.pages": "96", "jax": "1"}


class Group:
    """A leader that waits on a thread of its own, and what both sides say of broken groups."""

    def __init__(self, processes: int = 2) -> None:
        self.address = f"127.0.0.1:{free_ports()}"
        self.lost: list[str] = []
        self.leader = Leader(self.address, processes, self.lost.append)
        self.refusal: PlanError | None = None
        self.gathering = threading.Thread(target=self._gather)
        self.gathering.start()

    def _gather(self) -> None:
        try:
            self.leader.gather(DECISIONS, timeout_s=10)
        except PlanError as error:
            self.refusal = error

    def follower(self, process_id: int = 1, decisions: dict[str, str] = DECISIONS) -> Follower:
        follower = Follower(self.address, process_id, self.lost.append)
        follower.join(decisions, timeout_s=10)
        return follower

    def heard(self, words: str) -> bool:
        """Did anybody say so, in the next ten seconds?"""
        deadline = time.monotonic() + 10
        while not any(words in said for said in self.lost) and time.monotonic() < deadline:
            time.sleep(0.01)
        return any(words in said for said in self.lost)


@pytest.fixture
def group_of() -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def make(processes: int = 2) -> Group:
        groups.append(Group(processes))
        return groups[-1]

    yield make
    for group in groups:
        group.gathering.join()
        group.leader.close()


def plain(numbers: np.ndarray | None) -> list[int] | None:
    return None if numbers is None else numbers.tolist()


def test_followers_get_every_launch_in_order_and_then_the_end(group_of):
    group = group_of(3)
    followers = [group.follower(1), group.follower(2)]
    group.gathering.join()
    made: list[list[tuple]] = [[], []]
    threads = [
        threading.Thread(
            target=follower.run,
            args=(lambda size, *told, said=said: said.append((size, *map(plain, told))),),
        )
        for follower, said in zip(followers, made)
    ]
    for thread in threads:
        thread.start()
    told = [(Size(n % 3, n), [n, -1], [1, -n] if n % 2 else None) for n in range(5 * AHEAD)]
    for size, plan, mask in told:
        masks = None if mask is None else np.array(mask, np.int32)
        group.leader.publish(size, np.array(plan, np.int32), masks)
    group.leader.close()
    for thread in threads:
        thread.join(10)
    assert made == [told, told]
    assert group.lost == []


def test_one_that_decided_otherwise_is_refused_with_the_difference(group_of):
    group = group_of()
    message = r"process 1 on \S+ has decided shapes.pages=97, and the leader shapes.pages=96"
    with pytest.raises(PlanError, match=message):
        group.follower(1, {**DECISIONS, "shapes.pages": "97"})
    group.gathering.join()
    assert group.refusal is not None


def test_an_id_is_taken_once(group_of):
    group = group_of(3)
    first = group.follower(1)
    with pytest.raises(PlanError, match="not awaited"):
        group.follower(1)
    group.gathering.join()
    assert first


def test_a_leader_that_ends_before_it_is_ready_is_lost(group_of):
    group = group_of()
    follower = group.follower()
    group.gathering.join()
    group.leader.close()
    assert group.heard("has ended before it was ready")
    assert follower


def test_a_follower_that_goes_is_lost_by_name(group_of):
    group = group_of()
    follower = group.follower()
    group.gathering.join()
    follower._channel.close()
    assert group.heard("process 1 on")


def test_nobody_there():
    leader = Leader(f"127.0.0.1:{free_ports()}", 2, pytest.fail)
    with pytest.raises(PlanError, match=r"process 1 did not come to .* within 0.1 s"):
        leader.gather(DECISIONS, timeout_s=0.1)
    with pytest.raises(EngineLost, match="did not answer"):
        Follower("127.0.0.1:1", 1, pytest.fail).join(DECISIONS, timeout_s=0.1)
