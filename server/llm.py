"""`LLM`: a model inside a Python program, without HTTP. The engine is a process of its own, as `xlane serve`'s is.

Texts, templates, grammars and limits go through the code that the OpenAI routes use, so a program gets what a client of
the server would. Knows no sockets; what runs the model is `loaded.py`'s.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Self, Unpack, cast, overload

from ..engine import EngineError, EngineInfo
from . import flags
from .backend import Backend
from .cli import Command, settle
from .console import Console
from .errors import Invalid, NotReady, ServerError
from .front import make_front
from .generate import collect, run_all
from .headers import Clock
from .loaded import LoadedModel
from .loop_thread import LoopThread
from .openai_chat import prepare as prepare_chat
from .openai_completions import prepare as prepare_completion
from .openai_run import Job, answer_of
from .options import UsageError, did_you_mean
from .reader import openai_finish, whole
from .sampling import ChatOptions, Completion, Delta, Sampling, chat_body, completion_body, completion_of
from .together import together
from .tool_parser import Piece

Prompt = str | Sequence[int]
"""A text, or token ids."""
Message = Mapping[str, Any]
"""One message of a conversation, as OpenAI's API has it."""
Ask = Callable[[], Awaitable[Job]]
"""Checks a prompt and makes it ready to run."""

_TEXT = ("tokenizer-config-path", "reasoning-parser")
_GROUPS = {
    "Model": flags.MODEL,
    "Limits": flags.LIMITS,
    "Device": flags.DEVICE,
    "Text": tuple(flag for flag in flags.HTTP if flag.name in _TEXT),
}
_COMMAND = Command("serve", "", _GROUPS, lambda settings: 0, takes_model=False)
_NAMES = [
    flag.name.replace("-", "_") for group in _GROUPS.values() for flag in group if flag.name != "model-id"
]


class LLM:
    """A model that answers, from construction to `close`. Safe to use from several threads."""

    def __init__(self, model: str = "demo", *, progress: bool = True, **options: Any) -> None:
        """Start the model and return when it answers.

        Args:
            model: Hub repository, directory of safetensors, GGUF file, or `demo`.
            progress: show on stderr how far the start is.
            options: those of `xlane serve` about model, limits and device, with underscores: `max_total_tokens=4096`,
                `quantize="int8"`. Variables of the environment set none.

        Raises: UsageError for an option that is unknown or has a wrong value, HubError and other ModelErrors if the
            model cannot be had or read, PlanError if it cannot work here, EngineLost if its engine keeps dying.
        """
        settings = settle(_COMMAND, _arguments(model, options), {}, {})
        server = replace(settings.server, max_stop_sequences=sys.maxsize)
        # It stays open as long as the engine may speak.
        self._said = sys.stderr if progress else open(os.devnull, "w")  # noqa: SIM115
        self._backend = Backend()
        self._front = make_front(self._backend, server)
        self._model = LoadedModel(
            settings.engine,
            settings.run,
            self._backend,
            Console(self._said),
            tokenizer_config_path=server.tokenizer_config_path,
        )
        self._loop = LoopThread("xlane-llm")
        self._closed = False
        try:
            self.info: EngineInfo = self._loop.run(self._start())
            """What is served and with which limits."""
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine; what still runs ends with an error. Once is enough."""
        if self._closed:
            return
        self._closed = True
        self._backend.drain()
        try:
            self._loop.run(self._model.unload())
        finally:
            self._loop.close()
            self._front.close()
            if self._said is not sys.stderr:
                self._said.close()

    # A text is a sequence of texts, too; the first that fits is taken.
    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self, prompts: Prompt, sampling: Sampling | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Completion | list[Completion]:
        """Go on from a prompt, or from each of several, which are then computed together; the answers in order.

        `sampling` is for all of them, or one for each. All prompts are checked before any is computed.

        Raises: Invalid (TooLong, Unsupported), RequestFailed, EngineLost, NotReady.
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            return self._all(self._completion, [prompts], sampling)[0]
        return self._all(self._completion, prompts, sampling)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Delta]:
        """Go on from a prompt; what is generated, as it comes. Leaving the iterator ends the generation.

        Raises, on first iteration: what `generate` raises.
        """
        return self._stream(partial(self._completion, prompt, sampling or Sampling()))

    @overload
    def chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None, **options: Unpack[ChatOptions]
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Completion]: ...
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion | list[Completion]:
        """Answer a conversation, or each of several, which are then computed together; the answers in order.

        Args:
            messages: a conversation, in OpenAI's form; it is written as the model's own chat template wants it.
            sampling: for all of them, or one for each.
            options: what else a chat may ask for, in OpenAI's form.

        Raises: what `generate` raises, and TemplateFailed.
        """
        ask = partial(self._chat, options)
        if messages and isinstance(messages[0], Mapping):
            return self._all(ask, [messages], sampling)[0]
        return self._all(ask, messages, sampling)

    def stream_chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None, **options: Unpack[ChatOptions]
    ) -> Iterator[Delta]:
        """Answer a conversation; what is generated, as it comes. Leaving the iterator ends the generation.

        Raises, on first iteration: what `chat` raises.
        """
        return self._stream(partial(self._chat, options, messages, sampling or Sampling()))

    async def _start(self) -> EngineInfo:
        info = await self._model.load()
        self._watching = asyncio.create_task(self._watch())
        return info

    async def _watch(self) -> None:
        """An engine that is lost for good is no longer waited for."""
        try:
            await self._model.wait()
        except EngineError as error:
            self._backend.down(str(error))
            await self._model.unload(0.0)

    async def _completion(self, prompt: Any, sampling: Sampling) -> Job:
        body = completion_body(prompt, sampling)
        asked = body.prompt if isinstance(body.prompt, str) else cast("list[int]", body.prompt)
        return await prepare_completion(self._front, body, [asked], Clock())

    async def _chat(self, options: ChatOptions, messages: Any, sampling: Sampling) -> Job:
        return await prepare_chat(self._front, chat_body(messages, sampling, **options), Clock())

    def _all(
        self,
        ask: Callable[[Any, Sampling], Awaitable[Job]],
        prompts: Sequence[Any],
        sampling: Sampling | Sequence[Sampling] | None,
    ) -> list[Completion]:
        each = (
            [sampling or Sampling()] * len(prompts)
            if sampling is None or isinstance(sampling, Sampling)
            else sampling
        )
        if len(each) != len(prompts):
            raise Invalid(f"{len(prompts)} prompts and {len(each)} samplings: give one, or one for each")
        self._check_open()
        return self._loop.run(self._finish([partial(ask, *pair) for pair in zip(prompts, each)]))

    async def _finish(self, asks: Sequence[Ask]) -> list[Completion]:
        jobs: list[Job] = []
        for number, ask in enumerate(asks):
            try:
                jobs.append(await ask())
            except ServerError as error:
                error.add_note(f"in prompt {number} of {len(asks)}, counted from 0")
                raise
        # As many as run, and as many again that wait in the engine for their lanes.
        gate = asyncio.Semaphore(self.info.lanes + min(self.info.lanes, self.info.max_queued))
        return await together(self._finish_one(job, gate) for job in jobs)

    async def _finish_one(self, job: Job, gate: asyncio.Semaphore) -> Completion:
        async with gate:
            (tokens,), (done,) = await collect(job.serving.engine, job.runs, self._front.metrics)
        return completion_of(job.prompts[0], answer_of(job.readers()[0], tokens, done), tokens)

    def _stream(self, ask: Ask) -> Iterator[Delta]:
        self._check_open()
        return self._loop.iterate(self._deltas(ask))

    async def _deltas(self, ask: Ask) -> AsyncGenerator[Delta, None]:
        job = await ask()
        (reader,), said = job.readers(), list[Piece]()
        async with aclosing(run_all(job.serving.engine, job.runs, self._front.metrics)) as arrived:
            async for progress in arrived:
                reasoning, pieces = reader.of(progress)
                said += pieces
                text = "".join(piece for piece in pieces if isinstance(piece, str))
                if progress.done is None:
                    yield Delta(text=text, reasoning=reasoning, tokens=progress.tokens)
                    continue
                calls = tuple(piece for piece in whole(said) if not isinstance(piece, str))
                finish = openai_finish(progress.done, len(calls))
                yield Delta(
                    text=text, reasoning=reasoning, tokens=progress.tokens, calls=calls, finish_reason=finish
                )

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady("this LLM is closed: make another one, or use it inside of its `with` block")


def _arguments(model: str, options: Mapping[str, Any]) -> list[str]:
    """The command line that asks for the same. Raises UsageError."""
    for name in options:
        if name not in _NAMES:
            raise UsageError(
                f"LLM has no option {name}{did_you_mean(name, _NAMES) or ': ' + ', '.join(_NAMES)}"
            )
    given = {name: value for name, value in options.items() if value is not None}
    return [f"--model-id={model}", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]
