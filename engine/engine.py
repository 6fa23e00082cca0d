"""The engine in one object: built from a configuration, then asked by any thread. Implements `local.EngineCore`.

Everything a request can get wrong is refused here, at the door, before it may touch a batch.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
from llguidance import LLTokenizer

from ..models.config import ModelConfig
from ..models.spec import parameters
from ..models.weights import WeightSource
from .adapters import Adapters
from .build import Built, Progress, build
from .config import EngineConfig
from .draft import Drafter
from .errors import InvalidRequest, Overloaded, PlanError
from .grammar import Grammars
from .group import Leader
from .keeper import Keeper
from .launcher import Launcher
from .local import Sink
from .loop import Loop
from .monitor import CompileCounter
from .pace import Pace
from .pages import PageAllocator
from .request import (
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    EngineInfo,
    EngineStats,
    Request,
    SamplingParams,
    check_prompt_scores,
)
from .runner import Runner
from .scheduler import Limits, Scheduler
from .sequence import Sequence
from .state import MAX_STOP_IDS
from .stats import Counters
from .turn import SEGMENT_TOKENS

MAX_RETRY_AFTER_S = 60.0
"""A longer advice would outlive the load it was measured at."""


class Engine:
    """Serves one model. Make it with `Engine.build`."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        built: Built,
        model_sha: str | None = None,
        leader: Leader | None = None,
        guidance: Callable[[], LLTokenizer] | None = None,
    ) -> None:
        """`leader` tells the other processes, if there are any, what to launch; stopping the engine closes it. `guidance`
        makes the tokenizer of grammars when the first one comes, and may raise ModelError; None takes no grammars."""
        blueprint = built.programs.blueprint
        self.memory = built.memory
        self._max_queued = config.max_queued
        self._guesses, self._heads = config.speculate, blueprint.heads is not None
        self._pages = PageAllocator(built.memory.pages)
        limits = Limits(
            blueprint.shapes.lanes,
            blueprint.shapes.page_tokens,
            built.chunk_tokens,
            blueprint.prefill_segments,
            max(size.rows for size in blueprint.sizes) if config.speculate else 0,
            SEGMENT_TOKENS,
        )
        pace = Pace(blueprint.sizes, None if config.target_itl_ms is None else config.target_itl_ms / 1e3)
        self._scheduler = Scheduler(limits, self._pages, pace.prompt_tokens)
        self._counters = Counters()
        self._arrivals = itertools.count()
        self._leader = leader
        self._grammars = None if guidance is None else Grammars(guidance, model.vocab_size)
        self._launcher = launcher = Launcher(built.programs, built.params)
        self._keeper = _keeper(config, model_sha, launcher, self._pages)
        runner = Runner(blueprint, launcher, None if leader is None else leader.publish)
        self._loop = Loop(runner, self._scheduler, self._counters, pace.observe)
        self._adapters = Adapters(
            model.lora, built.adapter_arrays, blueprint.graph.specs, launcher, self._loop.computes_with
        )
        device = blueprint.placement.device
        self._info = EngineInfo(
            model_id=config.model_id,
            model_sha=model_sha,
            dtype=blueprint.dtype,
            platform=device.platform,
            device_kind=device.device_kind,
            device_count=blueprint.placement.mesh.size,
            vocab_size=model.vocab_size,
            max_total_tokens=built.memory.max_total_tokens,
            max_input_tokens=built.max_input_tokens,
            lanes=limits.lanes,
            pages=built.memory.pages,
            page_tokens=blueprint.shapes.page_tokens,
            max_queued=config.max_queued,
            kernels=built.kernels_note,
            memory_bytes=built.memory.limit_bytes,
            warning=built.warning,
            quantize=blueprint.quantize or "",
            kv_dtype=config.kv_dtype or "",
            parameters=parameters(blueprint.graph.specs),
            weights_bytes=built.memory.weights_bytes,
            kv_bytes=built.memory.kv_bytes,
            temp_bytes=built.memory.temp_bytes,
            speculate=config.speculate,
            programs=built.programs.infos,
            version=version("xlane"),
        )
        jax.block_until_ready(built.params)
        self._compiles = CompileCounter(self._loop.thread)
        self._loop.start()

    @classmethod
    def build(
        cls,
        config: EngineConfig,
        model: ModelConfig,
        source: WeightSource | None,
        progress: Progress | None = None,
        model_sha: str | None = None,
        guidance: Callable[[], LLTokenizer] | None = None,
    ) -> "Engine":
        """Load, compile and start. Raises PlanError and ModelError."""
        return cls(config, model, build(config, model, source, progress), model_sha, guidance=guidance)

    @property
    def info(self) -> EngineInfo:
        """See `EngineCore.info`."""
        return replace(self._info, adapters=self._adapters.names)

    def submit(self, request: Request, sink: Sink) -> None:
        """See `EngineCore.submit`. A new grammar is compiled here, which may take a second."""
        self._check(request)
        budget = request.sampling.max_tokens + len(request.prompt_ids)
        most = min(budget, self._info.max_total_tokens)
        with self._adapters.found(request.adapter) as slot:
            self._enter(Sequence(request, sink, next(self._arrivals), most, slot.number, slot.digest))

    def _enter(self, sequence: Sequence) -> None:
        if self._guesses and not sequence.counts:  # penalties look at tokens, which must be known
            sequence.drafter = Drafter(sequence.tokens, self._guesses, self._heads)
        grammar, most_live = sequence.request.grammar, self._info.lanes + self._max_queued
        if grammar is not None:
            if self._loop.live >= most_live:  # what would be refused in the end need not be compiled first
                raise self._full()
            self._guide(sequence, grammar)
        if not self._loop.submit(sequence, most_live):
            raise self._full()

    def load_adapter(self, name: str, folder: str, digest: str = "") -> str:
        """See `EngineCore.load_adapter`."""
        return self._adapters.load(name, folder, digest)

    def unload_adapter(self, name: str) -> None:
        """See `EngineCore.unload_adapter`."""
        self._adapters.unload(name)

    def _guide(self, sequence: Sequence, grammar: str) -> None:
        """Make the sequence keep to a grammar. Raises InvalidRequest."""
        if self._grammars is None:
            raise InvalidRequest("this engine was built without a tokenizer, so it takes no grammar")
        request = sequence.request
        guide = self._grammars.guide(grammar, request.resume_ids, request.sampling)
        if any(token in guide.end_ids for token in request.resume_ids):
            raise InvalidRequest(
                "nothing is left to generate: the resumed tokens end what the grammar allows"
            )
        sequence.follow(guide)

    def cancel(self, request_id: str) -> None:
        """See `EngineCore.cancel`."""
        self._loop.cancel(request_id)

    def stats(self) -> EngineStats:
        """See `EngineCore.stats`."""
        running, queued = self._load()
        return EngineStats(
            lanes_active=running,
            queued=queued,
            pages_free=self._pages.free,
            pages_remembered=self._pages.remembered,
            pages_total=self._pages.total,
            steps=self._counters.steps,
            prefill_tokens=self._counters.prefill_tokens,
            decode_tokens=self._counters.decode_tokens,
            preemptions=self._scheduler.preemptions,
            compiles_after_ready=self._compiles.count,
            step_ms=self._counters.step_ms,
            queue_wait_s=self._counters.queue_wait_s(queued, running),
            host_ms=self._counters.host_ms,
            gap_ms=self._counters.gap_ms,
            prefill=self._counters.prefill.snapshot(),
            decode=self._counters.decode.snapshot(),
            prefill_rows=self._counters.prefill_rows.snapshot(),
            joins=self._counters.joins,
            guessed_tokens=self._scheduler.guessed,
            accepted=self._counters.accepted.snapshot(),
            taken_lanes=self._scheduler.taken_lanes(),
        )

    def healthy(self) -> bool:
        """See `EngineCore.healthy`."""
        return self._loop.healthy()

    def alive(self) -> bool:
        """See `EngineCore.alive`."""
        return self._loop.alive()

    def drain(self, timeout_s: float) -> None:
        """See `EngineCore.drain`."""
        self._loop.close_intake()
        if not self._loop.wait_idle(timeout_s):
            self._loop.cancel_all()
            self._loop.wait_idle(timeout_s=5.0)

    def wait_loaded(self) -> None:
        """Until every program is here: until then some work is done by larger ones than it needs."""
        self._launcher.wait()

    def stop(self) -> None:
        """See `EngineCore.stop`."""
        self._loop.stop()
        self._launcher.close()
        keeper, self._keeper = self._keeper, None
        if keeper is not None and self._loop.ended:
            keeper.save()
        if self._leader is not None:
            self._leader.close()
        if self._grammars is not None:
            self._grammars.close()
        self._compiles.close()

    def _load(self) -> tuple[int, int]:
        """Sequences that run and that wait."""
        running = self._scheduler.running
        return running, max(0, self._loop.live - running)

    def _full(self) -> Overloaded:
        running, queued = self._load()
        retry_after_s = min(MAX_RETRY_AFTER_S, max(1.0, self._counters.queue_wait_s(queued, running)))
        return Overloaded(
            f"the queue is full ({self._max_queued} requests wait; --max-queued)", retry_after_s
        )

    def _check(self, request: Request) -> None:
        """Raise InvalidRequest for anything this engine can never serve."""
        prompt = len(request.prompt_ids)
        if not prompt:
            raise InvalidRequest("the prompt is empty: give at least one token")
        if prompt > self._info.max_input_tokens:
            raise InvalidRequest(
                f"the prompt has {prompt} tokens; at most {self._info.max_input_tokens} are taken (--max-input-tokens)"
            )
        for token in itertools.chain(request.prompt_ids, request.resume_ids):
            if not 0 <= token < self._info.vocab_size:
                raise InvalidRequest(f"token id {token} is outside the vocabulary of {self._info.vocab_size}")
        if prompt + len(request.resume_ids) >= min(
            self._info.max_total_tokens, prompt + request.sampling.max_tokens
        ):
            raise InvalidRequest(
                f"nothing is left to generate: {len(request.resume_ids)} tokens resumed, max_tokens={request.sampling.max_tokens}"
            )
        if request.deadline_s is not None and not request.deadline_s > 0:
            raise InvalidRequest(f"deadline_s={request.deadline_s} is not above 0")
        if request.weight < 1:
            raise InvalidRequest(f"weight={request.weight} is not at least 1")
        top = request.prompt_logprobs
        if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(f"prompt_logprobs={top} is outside 0 … {MAX_TOP_LOGPROBS}")
        if top is not None:
            check_prompt_scores(prompt, top)
        check_sampling(request.sampling, self._info.vocab_size)


def _keeper(
    config: EngineConfig, model_sha: str | None, launcher: Launcher, pages: PageAllocator
) -> Keeper | None:
    """Who keeps the prefix cache over a restart, if that is asked for, with what the last engine left. Raises PlanError."""
    if config.prefix_cache_path is None:
        return None
    if config.processes > 1:
        raise PlanError(
            "the pages of several processes cannot be kept in a file: leave out --prefix-cache-path"
        )
    keeper = Keeper(Path(config.prefix_cache_path), config.prefix_cache_bytes, model_sha, launcher, pages)
    keeper.load()
    return keeper


def check_sampling(s: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest for a parameter out of its range, naming it and its value."""
    bounds = (
        ("max_tokens", s.max_tokens, 1, 2**31 - 1),
        ("min_tokens", s.min_tokens, 0, s.max_tokens),
        ("temperature", s.temperature, 0.0, 1e4),
        ("top_k", s.top_k, 0, 2**31 - 1),
        ("top_p", s.top_p, 1e-9, 1.0),
        ("min_p", s.min_p, 0.0, 1.0),
        ("typical_p", s.typical_p, 1e-9, 1.0),
        ("repetition_penalty", s.repetition_penalty, 1e-4, 1e4),
        ("frequency_penalty", s.frequency_penalty, -1e4, 1e4),
        ("presence_penalty", s.presence_penalty, -1e4, 1e4),
        ("seed", s.seed, 0, 2**64 - 1),
        ("top_logprobs", s.top_logprobs, 0, MAX_TOP_LOGPROBS),
        ("stop_ids (count)", len(s.stop_ids), 0, MAX_STOP_IDS),
        ("logit_bias (count)", len(s.logit_bias), 0, MAX_LOGIT_BIAS),
        *((f"logit_bias of token {token}", bias, -1e4, 1e4) for token, bias in s.logit_bias),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:  # false for NaN, too
            raise InvalidRequest(f"{name}={value} is outside {low} … {high}")
    for token in s.stop_ids:
        # A tokenizer may know more ids than the model, so these need not be in its vocabulary; but they must fit a lane.
        if not 0 <= token < 2**31:
            raise InvalidRequest(f"stop_ids: {token} is not a token id")
    biased = [token for token, _ in s.logit_bias]
    for token in biased:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"logit_bias: token id {token} is outside the vocabulary of {vocab_size}")
    if len(set(biased)) < len(biased):
        raise InvalidRequest("logit_bias names a token twice")
    if s.top_logprobs and not s.logprobs:
        raise InvalidRequest(f"top_logprobs={s.top_logprobs} needs logprobs=True")
