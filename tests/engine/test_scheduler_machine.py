"""The scheduler against a simulated device under random arrivals and priorities, beginnings shared, cancels and deadlines (which
are one to it), late masks, small budgets and shortage."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.test_scheduler import MOST, PAGE, scheduler, sequence
from tests.support.fake_device import FakeDevice, FakeGuide, FakeLaunch, Oracle, expected_ids
from xlane.engine import FinishReason, StepOutput
from xlane.engine.pages import pages_for
from xlane.engine.sequence import Phase, Sequence
from xlane.engine.turn import SEGMENT_TOKENS, Size, Turn


class Machine(RuleBasedStateMachine):
    """Random requests over a simulated device, one turn ahead as `loop.Loop` runs it.

    The device computes tokens from what it reads through its page tables, so equal outputs mean that no page, lane or
    write went wrong; the invariants name what did.
    """

    @initialize(
        pages=st.integers(pages_for(MOST, PAGE), 12),
        lanes=st.integers(1, 6),
        chunk=st.sampled_from([3, 8, 16]),
        packed=st.integers(1, 4),
        beside=st.integers(1, 16),
        guess_rows=st.sampled_from([0, 2, 16]),
        each=st.sampled_from([1, SEGMENT_TOKENS]),
    )
    def start(
        self, pages: int, lanes: int, chunk: int, packed: int, beside: int, guess_rows: int, each: int
    ) -> None:
        self.plans = scheduler(
            pages,
            lanes,
            chunk,
            packed,
            lambda rows, *told: min(chunk, beside) if rows else chunk,
            lanes + guess_rows,
            each,
        )
        self.beside = beside
        self.device = FakeDevice(lanes, pages, PAGE, pages_for(MOST, PAGE))
        self.behind: FakeLaunch | None = None
        self.all: list[Sequence] = []
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.cancelled: set[str] = set()
        self.late: list[FakeGuide] = []
        """Guides whose masks were not computed yet."""

    @rule(
        prompt=st.lists(st.integers(0, 63), min_size=1, max_size=MOST - 1),
        max_tokens=st.integers(1, MOST),
        stop=st.none() | st.integers(0, 63),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        seed=st.integers(0, 3),
        given=st.integers(0, 6),
        guided=st.none() | st.integers(0, MOST),
        oracle=st.none() | st.tuples(st.integers(1, 6), st.integers(1, 5)),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        stop: int | None,
        priority: int,
        seed: int,
        given: int,
        guided: int | None = None,
        oracle: tuple[int, int] | None = (4, 3),
    ) -> None:
        """`oracle`: how many tokens are guessed at a time, and every how manieth is wrong."""
        options = {"stop_ids": (stop,) if stop is not None else (), "seed": seed, "priority": priority}
        options |= {"guided": guided, "late": self.late, "repetition_penalty": 1.5 if seed == 3 else 1.0}
        if guided is not None:
            options["stop_ids"] = ()  # FakeGuide knows no end but its own
        one = sequence(len(self.all), prompt, max_tokens, **options)
        resume = expected_ids(one.request, MOST)[:-1][:given]  # as after the loss of an engine
        one = sequence(len(self.all), prompt, max_tokens, resume=resume, **options)
        if oracle is not None and not one.counts:
            most, wrong = oracle
            drafter = Oracle(one, most, MOST, lambda at: at % wrong == wrong - 1)
            one.drafter = drafter  # type: ignore[assignment]
        self.all.append(one)
        self.outputs[one.request.id] = list(resume)
        self.plans.add(one)

    @rule(count=st.integers(2, 6), prompt=st.integers(1, 5), seed=st.integers(0, 3), guided=st.booleans())
    def burst(self, count: int, prompt: int, seed: int, guided: bool) -> None:
        """Short prompts with long outputs: all are admitted, and then there are not enough pages."""
        for number in range(count):
            self.submit(
                [seed, number, *range(prompt - 1)],
                MOST,
                None,
                0,
                seed,
                0,
                MOST if guided and number % 2 else None,
            )

    @precondition(lambda self: self.all)
    @rule(
        which=st.integers(0, 10**6),
        kept=st.integers(1, MOST - 2),
        new=st.lists(st.integers(0, 63), max_size=3),
    )
    def follow_up(self, which: int, kept: int, new: list[int]) -> None:
        """A prompt that begins as another sequence does or did."""
        one = self.all[which % len(self.all)]
        self.submit([*one.tokens[:kept], *new][: MOST - 1], MOST, None, 0, one.request.sampling.seed, 0)

    @precondition(lambda self: self.all)
    @rule(which=st.integers(0, 10**6))
    def cancel(self, which: int) -> None:
        one = self.all[which % len(self.all)]
        if one.phase is not Phase.FINISHED:
            self.cancelled.add(one.request.id)
        self.plans.drop(one)

    @rule(count=st.integers(1, 6), masks=st.integers(0, 3), hopes=st.booleans())
    def turn(self, count: int, masks: int = 8, hopes: bool = True) -> None:
        """`hopes`: what is in flight is read first where the scheduler asks for it. Nothing may go wrong if it is not."""
        for _ in range(count):
            if hopes and self.plans.hopes:
                self.read()
            for guide in self.late[:masks]:
                guide.compute()
            del self.late[:masks]
            plan = self.plans.plan()
            limits = self.plans.limits
            assert sum(len(segment.tokens) for segment in plan.segments) <= limits.chunk_tokens
            assert len(plan.segments) <= limits.chunk_segments
            if limits.segment_tokens == SEGMENT_TOKENS and plan.segments:
                size = Size(limits.lanes, min(limits.chunk_tokens, self.beside if plan.rows else 16))
                assert len(plan.segments) <= size.segments(limits.chunk_segments)
                assert size.holds(*plan.asks)
            if plan.rows:
                assert sum(len(segment.tokens) for segment in plan.segments) <= self.beside
            assert all(one.length + one.guessed <= one.most_tokens for one in plan.decoded)
            assert len(plan.rows) <= max(limits.decode_rows, limits.lanes)
            launch = self.device.launch(plan)
            self.tables_agree(plan)
            self.read()
            self.behind = launch

    def read(self) -> None:
        for one, made, offered in self.behind.read() if self.behind else ():
            self.take(self.plans.absorb(one, made, offered))
        self.behind = None

    def take(self, output: StepOutput | None) -> None:
        if output is None:
            return
        name = output.request_id
        assert name not in self.cancelled
        assert name not in self.reasons
        self.outputs[name] += [token.id for token in output.tokens]
        if output.finish_reason is not None:
            self.reasons[name] = output.finish_reason

    def tables_agree(self, turn: Turn) -> None:
        """What the device reads for a lane is what the host thinks the lane holds."""
        for one in (*turn.prefilled, *turn.decoded):
            used = pages_for(one.computed + one.guessed, PAGE)
            assert self.device.lanes[one.lane].table[:used] == one.pages[:used]

    @invariant()
    def nothing_is_shared_or_lost(self) -> None:
        if not hasattr(self, "plans"):
            return
        unfinished = [one for one in self.all if one.phase is not Phase.FINISHED]
        running = [one for one in unfinished if one.phase is not Phase.WAITING]
        assert sorted(map(id, unfinished)) == sorted(map(id, self.plans.sequences()))
        held = {page for one in self.all for page in one.pages}
        assert len(held) == self.plans.pages.total - self.plans.pages.free
        assert all(len(one.pages) == len(set(one.pages)) for one in self.all)
        lanes = [one.lane for one in running]
        assert len(lanes) == len(set(lanes)) <= self.plans.limits.lanes
        assert all(one.lane == -1 and not one.pages for one in self.all if one not in running)
        assert all(0 <= one.in_flight <= 2 for one in unfinished)

    def teardown(self) -> None:
        """Nobody starves, and every output is that of an undisturbed run."""
        if not hasattr(self, "plans"):
            return
        for _ in range((40 + MOST) * (len(self.all) + 1)):
            if not self.plans.sequences():
                break
            self.turn(1)
            self.nothing_is_shared_or_lost()
        assert not self.plans.sequences()
        self.turn(1)
        assert self.plans.pages.free == self.plans.pages.total
        for one in self.all:
            name, expected = one.request.id, expected_ids(one.request, MOST)
            if name in self.cancelled:
                assert self.outputs[name] == expected[: len(self.outputs[name])]
            else:
                assert self.outputs[name] == expected
                stops = one.request.sampling.stop_ids if one.guide is None else one.guide.end_ids
                stopped = expected[-1] in stops
                assert self.reasons[name] is (FinishReason.STOP if stopped else FinishReason.LENGTH)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
