"""The compiled programs of the demo model and nothing else: launched as the engine launches them, without scheduler or loop.

Knows lanes and positions; what is in the KV pool does not matter to a step's time, so a lane is put anywhere by prefilling
only the end of a prompt that was never computed.
"""

import time
from itertools import pairwise

import jax
import numpy as np

from xlane.engine.batch import pack_plan
from xlane.engine.build import build
from xlane.engine.config import EngineConfig
from xlane.engine.launcher import Launcher
from xlane.engine.request import SamplingParams
from xlane.engine.turn import NO_PAGE, Row, Segment, Turn


class Bare:
    """Programs and a launcher over them."""

    def __init__(self, options: EngineConfig, opened) -> None:
        built = build(options, opened.config, opened.source)
        self._b = built.programs.blueprint
        self._launcher = Launcher(built.programs, built.params)
        self._rng = np.random.default_rng(0)

    def prefill(self, lane: int, start: int, tokens: int, length: int, pages: list[int]) -> None:
        """Compute `tokens` of a prompt of `length` from position `start` on, and wait for it."""
        b = self._b
        segment = Segment(
            lane=lane,
            tokens=self._rng.integers(10, b.shapes.vocab, tokens).tolist(),
            start=start,
            last=start + tokens == length,
            prompt_tokens=length,
            remaining=b.shapes.table_width * b.shapes.page_tokens - length,
            pages=pages,
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        )
        np.asarray(self._launch([], [segment]))

    def _launch(self, rows: list[Row], segments: list[Segment]) -> jax.Array:
        b = self._b
        asks = Turn(segments=segments, rows=rows).asks
        size = next(size for size in b.sizes if size.holds(*asks))
        plan = pack_plan(rows, segments, size, b.segments(size), b.shapes.table_width, b.shapes.lanes)
        return self._launcher.launch(size, plan, None).result

    def prompt_ms(self, tokens: int) -> float:
        """A whole prompt in chunks, to its first token."""
        b = self._b
        pages = list(range(-(-tokens // b.shapes.page_tokens)))
        started = time.perf_counter()
        for start in range(0, tokens, b.chunk_tokens):
            self.prefill(0, start, min(b.chunk_tokens, tokens - start), tokens, pages)
        return 1e3 * (time.perf_counter() - started)

    def step_ms(self, rows: int, held: int, steps: int) -> list[float]:
        """The time of each of `steps` steps of `rows` lanes that hold `held` tokens at first. The next step is launched
        before the last is read."""
        b = self._b
        pages = -(-(held + steps) // b.shapes.page_tokens)
        tokens = min(held, *(size.tokens for size in b.sizes if size.tokens))
        for lane in range(rows):
            own = list(range(lane * pages, (lane + 1) * pages))
            self.prefill(lane, held - tokens, tokens, held, own)
        lanes = [Row(lane, 0, NO_PAGE) for lane in range(rows)]
        behind, moments = None, []
        for _ in range(steps):
            ahead = self._launch(lanes, [])
            if behind is not None:
                np.asarray(behind)
                moments.append(time.perf_counter())
            behind = ahead
        np.asarray(behind)
        moments.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(moments)]
