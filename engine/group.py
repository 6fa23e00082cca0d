"""The processes of one engine, kept together: the leader tells every launch, the followers make the same ones.

A follower holds a call to the leader open for its whole life. Whoever sees it break knows that the group is broken, for
no process can go on without the others' devices. Knows launches as names and bytes; nothing of arrays on devices.
"""

import atexit
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import grpc
import numpy as np

from .errors import EngineLost, PlanError
from .proto import xlane_pb2 as pb
from .proto import xlane_pb2_grpc
from .rpc_server import CHANNEL_OPTIONS
from .turn import Size

JOIN_S = 300.0
"""How long one waits for the other side before the model is loaded."""
STALL_S = 60.0
"""A follower that takes no launch for so long is lost."""
AHEAD = 8
"""Launches that the leader may be ahead of what a follower has taken."""

Lost = Callable[[str], None]
"""Told, once and on any thread, why the group is broken. Is expected to end the process."""

LaunchCall = Callable[[Size, np.ndarray, np.ndarray | None], object]


class _Threads(Executor):
    """A thread a call, and none that a process would wait for before it ends: a call lasts as long as the group."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """See `Executor.submit`."""
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="group-call", daemon=True).start()
        return future


class Leader(xlane_pb2_grpc.GroupServicer):
    """Process 0: takes the followers in and tells them what to launch."""

    def __init__(self, address: str, processes: int, lost: Lost) -> None:
        self._address = address
        self._missing = set(range(1, processes))
        self._lost = lost
        self._decisions: Mapping[str, str] = {}
        self._refused: str | None = None
        self._queues: list[tuple[int, queue.Queue[pb.Launch | None]]] = []
        self._news = threading.Condition()
        self._closing = False
        # Typed as a ThreadPoolExecutor; `submit` is all that is used.
        threads: Any = _Threads()
        self._server = grpc.server(threads, options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)])
        xlane_pb2_grpc.add_GroupServicer_to_server(self, self._server)

    def gather(self, decisions: Mapping[str, str], timeout_s: float = JOIN_S) -> None:
        """Wait until every follower is here and has decided the same. Raises PlanError."""
        self._decisions = decisions
        try:
            self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise PlanError(f"cannot listen for followers on {self._address}: {error}") from error
        self._server.start()
        atexit.register(self._abandon)
        with self._news:
            self._news.wait_for(lambda: self._refused or not self._missing, timeout_s)
            if self._refused is None and not self._missing:
                return
        self.close()
        raise PlanError(
            self._refused
            or f"process {min(self._missing)} did not come to {self._address} within {timeout_s:g} s"
        )

    def Follow(self, request: pb.FollowRequest, context: grpc.ServicerContext) -> Iterator[pb.Launch]:
        """A follower's call: the launches, for as long as there are any."""
        launches: queue.Queue[pb.Launch | None] = queue.Queue(AHEAD)
        with self._news:
            refusal = self._refusal(request)
            if refusal is None:
                self._missing.discard(request.process_id)
                self._queues.append((request.process_id, launches))
                context.add_callback(lambda: self._left(request))
            else:
                self._refused = refusal
            self._news.notify_all()
        if refusal is not None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        yield pb.Launch()
        while (launch := launches.get()) is not None:
            yield launch

    def _refusal(self, request: pb.FollowRequest) -> str | None:
        """Why this follower cannot be taken."""
        who = f"process {request.process_id} on {request.host}"
        if request.process_id not in self._missing:
            return f"{who} is not awaited: each process needs an id of its own, below --num-processes"
        for name in sorted({*self._decisions, *request.decisions}):
            theirs, ours = request.decisions.get(name, "nothing"), self._decisions.get(name, "nothing")
            if theirs != ours:
                return (
                    f"{who} has decided {name}={theirs}, and the leader {name}={ours}: "
                    "give all processes the same options, versions and model"
                )
        return None

    def _left(self, request: pb.FollowRequest) -> None:
        if not self._closing:
            self._lost(f"process {request.process_id} on {request.host} is gone, and its devices with it")

    def publish(self, size: Size, plan: np.ndarray, mask: np.ndarray | None) -> None:
        """Tell all followers. Waits for one that is far behind."""
        launch = pb.Launch(**size._asdict(), plan=_bytes(plan), mask=b"" if mask is None else _bytes(mask))
        for process_id, launches in self._queues:
            try:
                launches.put(launch, timeout=STALL_S)
            except queue.Full:
                self._lost(f"process {process_id} has taken no launch for {STALL_S:g} s")

    def _abandon(self) -> None:
        """This process ends by an error: break the calls, so that the followers hear of it at once."""
        self._closing = True
        self._server.stop(None)

    def close(self) -> None:
        """Let the followers end."""
        atexit.unregister(self._abandon)
        self._closing = True
        for _, launches in self._queues:
            try:
                launches.put(None, timeout=1.0)
            except queue.Full:
                pass  # the call is cut below
        self._server.stop(5.0).wait()


class Follower:
    """Any other process: takes launches from the leader."""

    def __init__(self, address: str, process_id: int, lost: Lost) -> None:
        self._address = address
        self._process_id = process_id
        self._lost = lost
        self._launches: queue.Queue[pb.Launch | None] = queue.Queue(AHEAD)
        self._running = False
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)

    def join(self, decisions: Mapping[str, str], timeout_s: float = JOIN_S) -> None:
        """Be taken in by the leader. Raises PlanError if it has decided otherwise, EngineLost if it is not there."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout_s)
        except grpc.FutureTimeoutError:
            raise EngineLost(f"the leader did not answer at {self._address} within {timeout_s:g} s") from None
        request = pb.FollowRequest(
            process_id=self._process_id, host=socket.gethostname(), decisions=decisions
        )
        call = xlane_pb2_grpc.GroupStub(self._channel).Follow(request)
        try:
            next(call)
        except grpc.RpcError as error:
            refused = call.code() is grpc.StatusCode.FAILED_PRECONDITION
            raise (PlanError if refused else EngineLost)(call.details()) from error
        threading.Thread(target=self._read, args=(call,), name="group", daemon=True).start()

    def _read(self, call: Any) -> None:
        leader = f"the leader (process 0 at {self._address})"
        try:
            for launch in call:
                self._launches.put(launch)
            if not self._running:
                self._lost(f"{leader} has ended before it was ready")
        except grpc.RpcError:
            self._lost(f"{leader} is gone: {call.details()}")
        self._launches.put(None)

    def run(self, launch: LaunchCall) -> None:
        """Make every launch until the leader ends the group."""
        self._running = True
        while (told := self._launches.get()) is not None:
            mask = np.frombuffer(told.mask, "<i4") if told.mask else None
            launch(Size(told.rows, told.tokens), np.frombuffer(told.plan, "<i4"), mask)
        self._channel.close()


def _bytes(numbers: np.ndarray) -> bytes:
    return numbers.astype("<i4", copy=False).tobytes()
