"""What this room needs of a tokenizer, and the threads it runs in. Knows strings and ids; no HTTP, no engine.

Tokenising a long text takes long enough to be felt by every stream of the process, so it never runs on the event loop.
"""

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
LEAST_LOOK_S = 0.01
"""Between two looks at work that has nearly used up its time."""


class TokenStream(Protocol):
    """The text of one sequence, piece by piece, never half a character."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """What is left at the end: replacement characters for an incomplete one, or nothing."""
        ...


class TextTokenizer(Protocol):
    """Text to ids and back, and the chat template. Safe to call from several threads."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def chat_template(self) -> str | None:
        """The template `apply_chat` follows when there are no tools."""
        ...

    @property
    def tool_template(self) -> str | None:
        """The one it follows when there are."""
        ...

    @property
    def response_template(self) -> Any:
        """How answers are to be read, as the model's files declare it, unchecked; None if they do not."""
        ...

    def template_variables(self, *, tools: bool = False) -> frozenset[str]:
        """What a caller of `apply_chat`, with tools or without, may set. Raises TokenizerError."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_chat(self, text: str) -> list[int]:
        """Ids of what `apply_chat` made, in which people's words are no control tokens."""
        ...

    def encode_chat_offsets(self, text: str) -> tuple[str, Sequence[tuple[int, int, int]]]:
        """The same text for people to see, and `encode_chat`'s ids, each with its bytes of that."""
        ...

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> Sequence[tuple[int, int, int]]:
        """(id, start, end) of every token; offsets in UTF-8 bytes, 0 and 0 for a token that is not in the text."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def stream(self, prompt_ids: Sequence[int] = ()) -> TokenStream:
        """Incremental decoding of what follows a prompt."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token's text by itself; special tokens show, half characters are replaced."""
        ...

    def is_special(self, token_id: int) -> bool: ...

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str: ...


def special_id(tokenizer: TextTokenizer, text: str) -> int | None:
    """The control token that is this text, if there is one."""
    ids = tokenizer.encode(text, False)
    known = len(ids) == 1 and tokenizer.is_special(ids[0]) and tokenizer.token_text(ids[0]) == text
    return ids[0] if known else None


class TooSlow(BaseException):
    """Work on text took longer than it may. No Exception, so that no handler in the work takes it for a failure there."""


class TextWorkers:
    """A few threads for tokenising and templates; more work than threads waits its turn."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="xlane-text")

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """The result of a call made on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def run_within(self, limit_s: float, work: Callable[[], T]) -> T:
        """The same for work in Python that must not take more than so many seconds of a processor: neither its turn counts, nor
        what a busy or halted machine does instead.

        Raises TooSlow. The thread is free again then: the exception is raised in it, at the work's next step.
        """
        work_ = _Stoppable(work)
        loop = asyncio.get_running_loop()
        watching: list[asyncio.TimerHandle] = []

        def look() -> None:
            left_s = limit_s - work_.used_s()
            if left_s <= 0:
                work_.stop()
            else:
                watching[:] = [loop.call_later(max(left_s, LEAST_LOOK_S), look)]

        def watched() -> T:
            loop.call_soon_threadsafe(look)
            return work_()

        try:
            return await self.run(watched)
        finally:
            work_.stop()
            for timer in watching:
                timer.cancel()

    def close(self) -> None:
        """Let running calls end, start no others."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Stoppable(Generic[T]):
    """Work that another thread can stop. A thread of Python's has no other way out of a loop."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._thread = 0
        self._began_s = 0.0
        """On the thread's own clock, which runs while it does."""
        self._stopped = False

    def __call__(self) -> T:
        with self._lock:
            if self._stopped:
                raise TooSlow
            self._thread = threading.get_ident()
            self._began_s = _clock_s(self._thread)
        try:
            return self._work()
        finally:
            with self._lock:
                self._thread = 0
            _step()

    def used_s(self) -> float:
        """Seconds of a processor so far; 0 before and after."""
        with self._lock:
            if not self._thread:
                return 0.0
            return _clock_s(self._thread) - self._began_s

    def stop(self) -> None:
        """Raise TooSlow where the work is now; nothing if it is done."""
        with self._lock:
            self._stopped = True
            if self._thread:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(TooSlow)
                )


def _clock_s(thread: int) -> float:
    """A thread's own clock, where the system lets others look at it; else the one on the wall."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _step() -> None:
    """A call, at which an exception that is due is raised: not later, in somebody else's work."""
