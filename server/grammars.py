"""Whether a grammar can be followed, found out before the engine hears of it: off the event loop, within bounds, once.

llguidance is Rust and lets other threads run. It bounds its own work (see `grammar_limits`); on top of that a client waits for no
more than the configured seconds, and a text over the configured number of bytes is not looked at. Knows grammars' texts, not what
they are for.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

import llguidance

from ..engine import InvalidRequest, check_grammar, compilers, grammar_limits
from .errors import Invalid

CACHE_BYTES = 8_000_000
"""Most text of grammars known to be right."""
_THREADS = 2


class Grammars:
    """Checks grammars and remembers which were right. Used from one event loop."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._threads = compilers(_THREADS, "xlane-grammar")
        self._known: OrderedDict[str, None] = OrderedDict()
        self._known_bytes = 0

    async def check(self, make: Callable[[], str], param: str) -> str:
        """The text that `make` returns, if it is a grammar that can be followed. Raises Invalid.

        Args:
            make: builds the text; called on a thread, may raise Invalid.
            param: what the client calls it.
        """
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._checked, make, param)
        try:
            async with asyncio.timeout(self._timeout_s):
                text = await work
        except TimeoutError:
            raise Invalid(
                f"`{param}` takes longer than {self._timeout_s:g} s to compile (--limit grammar_timeout_s=…)",
                param=param,
            ) from None
        self._remember(text)
        return text

    def close(self) -> None:
        """Let running checks end, start no others."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _checked(self, make: Callable[[], str], param: str) -> str:
        text = make()
        if (size := len(text.encode())) > self._max_bytes:
            raise Invalid(
                f"`{param}` makes a grammar of {size} bytes; at most {self._max_bytes} are taken "
                "(--limit max_grammar_bytes=N)",
                param=param,
            )
        if text not in self._known:
            try:
                check_grammar(text)
            except InvalidRequest as error:
                raise Invalid(_refusal(param, [str(error)]), param=param) from None
            # Warnings tell of what was chosen: `oneOf` is taken for `anyOf`, and token ids are ours and not checked.
            wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
                text, limits=grammar_limits()
            )
            if wrong:
                raise Invalid(_refusal(param, messages), param=param)
        return text

    def _remember(self, text: str) -> None:
        if text not in self._known:
            self._known_bytes += len(text)
        self._known[text] = None
        self._known.move_to_end(text)
        while self._known_bytes > CACHE_BYTES:
            oldest, _ = self._known.popitem(last=False)
            self._known_bytes -= len(oldest)


def _refusal(param: str, messages: list[str]) -> str:
    why = "; ".join(messages)
    # TGI's sentence, under the name that TGI has for it.
    return (
        f"grammar is not valid: {why}"
        if param.partition(".")[0] == "grammar"
        else f"`{param}` is not valid: {why}"
    )
