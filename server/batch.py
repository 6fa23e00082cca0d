"""`xlane batch`: a file of requests in, a file of answers out, some at a time. What was answered is not asked again.

A line that cannot be asked is a line of the output, too. Knows whom to ask: a model loaded for it, through the server's own
routes, or a server that runs; the files are `batch_lines.py`'s.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..engine.config import EngineConfig
from ..engine.errors import EngineError
from .app import create_app
from .backend import Backend
from .batch_lines import (
    BadLine,
    Question,
    Reply,
    answer_line,
    count_lines,
    error_line,
    read_answered,
    read_questions,
)
from .bench_client import Endpoint, exchange
from .commands import console_of
from .config import ServerConfig
from .console import Console
from .flags import RunConfig
from .in_process import post
from .loaded import LoadedModel
from .options import Options, UsageError
from .remote import RemoteError
from .together import together

T = TypeVar("T")
Ask = Callable[[str, Mapping[str, Any]], Awaitable[Reply]]
"""Path and body -> answer. Raises RemoteError where none comes."""

OK, CRASH = 0, 1
REMOTE_AT_ONCE = 64
SILENCE_S = 3600.0
"""Longest a server may take for an answer."""
PATIENCE_S = 3600.0
"""How long a request is asked again that a server has no room for."""
BUSY = (429, 503)


@dataclass(slots=True)
class Batch:
    """One run over the lines that have no answer yet."""

    lines: Iterator[Question | BadLine]
    output: BinaryIO
    console: Console
    total: int
    """Lines of the input."""
    done: int = 0
    """Those that have a line in the output."""
    failed: int = 0
    """Those of this run whose line tells of an error."""

    async def run(self, ask: Ask, at_once: int) -> None:
        """Have all of them answered. Raises RemoteError, OSError; by then there are only whole lines."""
        await together(self._work(ask) for _ in range(at_once))

    async def _work(self, ask: Ask) -> None:
        for item in self.lines:
            if isinstance(item, BadLine):
                self._write(error_line(item), good=False)
            else:
                reply = await _patiently(ask, item)
                self._write(answer_line(item, reply), good=reply.status == 200)

    def _write(self, line: bytes, *, good: bool) -> None:
        self.output.write(line)
        self.output.flush()
        self.done += 1
        self.failed += not good
        self.console.progress("batch", self.done, self.total, "requests")


def batch(engine: EngineConfig, server: ServerConfig, run: RunConfig, options: Options) -> int:
    """Answer a file. Raises UsageError, EngineError, ModelError."""
    source, target = _paths(options)
    console = console_of(run)
    try:
        total = count_lines(source)
        if target.exists() and target.samefile(source):
            raise UsageError(f"--output {target} is the input too: choose another one")
        answered = read_answered(target)
        output = target.open("ab")
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
    there = len(answered.ids) + len(answered.bad_lines)
    work = Batch(read_questions(source, answered), output, console, total, there)
    began = time.perf_counter()
    try:
        with output:
            asyncio.run(_run(work, engine, server, run, options))
    except RemoteError as error:
        console.settle()
        console.say(f"{error}; what was answered is in {target}: the same command goes on", "ERROR")
        return CRASH
    console.settle()
    seconds = time.perf_counter() - began
    console.say(
        f"{work.done - there} answered in {seconds:.1f} s, {work.failed} of them with an error; {there} were there: {target}"
    )
    return OK


def _paths(options: Options) -> tuple[Path, Path]:
    source, target = options.plain("input"), options.plain("output")
    if source is None or target is None:
        raise UsageError("give --input FILE, the requests, and --output FILE, where the answers go")
    typed = [
        origin
        for to, origin in options.origins.items()
        if to.startswith("engine.") and origin.startswith("--")
    ]
    if options.plain("url") is not None and typed:
        raise UsageError(f"--url asks a server that has its model: {typed[0]} has no meaning beside it")
    return Path(source), Path(target)


async def _run(
    work: Batch, engine: EngineConfig, server: ServerConfig, run: RunConfig, options: Options
) -> None:
    url, at_once = options.plain("url"), options.plain("concurrency")
    if url is not None:
        try:
            endpoint = Endpoint.parse(url, options.plain("api_key"))
        except ValueError as error:
            raise UsageError(f"--url: {error}") from None
        await work.run(partial(_ask_server, endpoint), at_once or REMOTE_AT_ONCE)
        return
    backend = Backend()
    # Nobody else asks: what protects a server from its clients does not apply.
    most = sys.maxsize
    config = replace(server, max_concurrent_requests=most, payload_limit=most, bodies_limit=most)
    app = create_app(backend, config)
    model = LoadedModel(
        engine, run, backend, work.console, tokenizer_config_path=server.tokenizer_config_path
    )
    try:
        info = await model.load()
        await _unless(model.wait(), work.run(partial(post, app), at_once or 2 * info.lanes))
    finally:
        await model.unload()
        app.state.front.close()


async def _unless(end: Awaitable[None], work: Awaitable[T]) -> T:
    """The result of `work`, unless `end` comes first, which is an error it raises."""
    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(end))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            await tasks[1]
            raise EngineError("the engine ended before the batch did")
        return await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask_server(endpoint: Endpoint, path: str, body: Mapping[str, Any]) -> Reply:
    answer = await exchange(endpoint, endpoint.request(path, body), SILENCE_S)
    if not answer.status:
        raise RemoteError(f"the server at {endpoint.host}:{endpoint.port} gives no answer: {answer.error}")
    return Reply(answer.status, answer.headers, bytes(answer.body))


async def _patiently(ask: Ask, question: Question) -> Reply:
    """The answer, asked for again while the server says that it has no room, and when to come back."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        reply = await ask(question.path, question.body)
        again = reply.headers.get("retry-after", "")
        if reply.status not in BUSY or not again.isdigit() or time.monotonic() > give_up:
            return reply
        await asyncio.sleep(int(again))
